"""`swifti2v plan`: a verdict, one table, the same as JSON, and refusals of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app

if TYPE_CHECKING:
    from click.testing import Result

GIB = 2**30


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})


def mapping(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments).stdout)
    return found


def test_a_verdict_comes_first_then_one_table_with_totals() -> None:
    result = run("--gpu", "3060", "--host-memory", "28")
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines[0] == "Fits: 8.4 GiB of GPU memory and 24.3 GiB of RAM; about 18 min on an RTX 3060"
    for words in (
        "loading",
        "text encoding",
        "stage one",
        "refinement",
        "18,480",
        "17,600",
        "5,403",
        "total",
        "in nf4",
    ):
        assert words in result.stdout
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout


def test_the_json_says_the_same() -> None:
    plan = mapping("--steps", "10", "--neighbors-after", "1", "--guidance", "5")
    assert (plan["size"], plan["num_inference_steps"], plan["gpu"]) == ("2560x1408", 10, "RTX 4090")
    tasks = {task["name"]: task for task in plan["tasks"]}
    # 2,232 TFLOP a step with neighbors on both sides, ten steps, two passes each.
    assert tasks["stage two"]["tflop"] == pytest.approx(2 * 22_319, rel=0.01)
    assert tasks["stage two"]["num_tokens"] == 6 * 3520
    assert plan["tflop"] == pytest.approx(sum(task["tflop"] for task in plan["tasks"]))
    assert plan["peak_bytes"] == pytest.approx(max(phase["peak_bytes"] for phase in plan["phases"]) + 0.8 * GIB, abs=1)
    assert plan["seconds"] == pytest.approx(plan["loading_seconds"] + sum(each["seconds"] for each in plan["phases"]))
    assert plan["verdict"].startswith("Fits: ")


def test_the_memory_is_the_cards_unless_given() -> None:
    budgets = {arguments: mapping(*arguments)["budget_bytes"] for arguments in ((), ("--gpu", "rtx 3060 12gb"))}
    assert list(budgets.values()) == [24 * GIB, 12 * GIB]
    assert mapping("--gpu", "3060", "--memory", "8")["budget_bytes"] == 8 * GIB
    assert mapping("--memory", "auto")["budget_bytes"] is None


def test_settings_are_the_checkpoints_unless_given() -> None:
    assert mapping()["num_inference_steps"] == 4
    mini = mapping("--model", "mini")
    assert (mini["num_inference_steps"], mini["size"]) == (1, "1280x704")
    assert {phase["placement"] for phase in mini["phases"]} == {"resident"}
    assert mapping("--model", "mini", "--steps", "2")["num_inference_steps"] == 2


def test_weights_can_be_stored_in_any_way() -> None:
    plans = {name: mapping("--dtype", name)["weight_bytes"] / GIB for name in ("bfloat16", "float8", "int8", "nf4")}
    assert plans == pytest.approx({"bfloat16": 75.04, "float8": 40.92, "int8": 44.31, "nf4": 23.7}, rel=0.01)
    assert mapping("--dtype", "int8")["weight_bytes"] == mapping("--quantization", "int8")["weight_bytes"]


@pytest.mark.parametrize("gpu", ["3060", "4060 ti", "4090"])
def test_a_host_of_32_gigabytes_has_room_for_one_stage_at_a_time(gpu: str) -> None:
    plan = mapping("--gpu", gpu, "--host-memory", "28GiB")
    assert plan["storage"] == ["nf4", "float8" if gpu == "3060" else "bfloat16"]
    assert plan["host_bytes"] < 28 * GIB
    assert [phase["phase"] for phase in plan["phases"]] == ["text encoding", "stage one", "refinement"]


def test_one_stage_alone() -> None:
    plans = {stage: mapping("--memory", "80", "--stage", stage) for stage in ("one", "two", "both")}
    phases = {stage: [phase["phase"] for phase in plan["phases"]] for stage, plan in plans.items()}
    assert phases["one"] + phases["two"] == phases["both"]
    assert {phase["placement"] for phase in plans["one"]["phases"]} == {"resident"}
    assert plans["one"]["weight_bytes"] + plans["two"]["weight_bytes"] == plans["both"]["weight_bytes"]


def test_the_light_decoder_is_planned_for() -> None:
    def decode(*arguments: str) -> float:
        return next(task["tflop"] for task in mapping(*arguments)["tasks"] if task["name"] == "decode")

    assert decode("--decoder", "light") < decode() / 150


def test_what_does_not_fit_is_told_what_to_try() -> None:
    result = run("--memory", "4")
    assert result.exit_code == 2
    assert result.stdout.startswith("Does not fit: no plan fits into 4.0 GiB: ")
    assert "try --size 1280x704" in result.stdout
    assert result.stdout.count("\n") == 1
    assert not mapping("--memory", "24", "--host-memory", "4")["fits"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--size", "100x100"),
        ("--size", "big"),
        ("--frames", "80"),
        ("--segment-size", "0"),
        ("--steps", "0"),
        ("--model", "sora"),
        ("--gpu", "abacus"),
        ("--gpu", "rtx3090", "--quantization", "float8"),
        ("--memory", "much"),
        ("--model", "mini", "--decoder", "light"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_no_torch_is_imported_for_a_standard_plan() -> None:
    code = "import sys; from swifti2v.cli.main import app; app(['plan', '--gpu', '3060'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # noqa: S603 - our own
