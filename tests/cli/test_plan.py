"""`swifti2v plan`: the numbers of the account, as a table and as JSON, and refusals of one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app

if TYPE_CHECKING:
    from click.testing import Result


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})


def test_table_names_every_phase() -> None:
    result = run()
    assert result.exit_code == 0
    for words in ("text encoding", "stage one", "reference encode", "stage two", "decode", "18,480", "17,600", "5,403"):
        assert words in result.stdout
    assert result.stderr == ""


def test_table_fits_a_terminal_of_eighty_columns() -> None:
    result = CliRunner().invoke(app, ["plan"], env={"COLUMNS": "80"})
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_holds_settings_phases_and_totals() -> None:
    result = run("--json", "--steps", "10", "--neighbors-after", "1", "--guidance", "5")
    plan = json.loads(result.stdout)
    assert plan["size"] == "2560x1408"
    assert plan["num_inference_steps"] == 10
    phases = {phase["name"]: phase for phase in plan["phases"]}
    # 2,232 TFLOP a step with neighbours on both sides, ten steps, two passes each.
    assert phases["stage two"]["tflop"] == pytest.approx(2 * 22_319, rel=0.01)
    assert phases["stage two"]["num_tokens"] == 6 * 3520
    assert plan["tflop"] == pytest.approx(sum(phase["tflop"] for phase in plan["phases"]))
    assert plan["peak_bytes"] == max(phase["peak_bytes"] for phase in plan["phases"])


def test_segment_options_reach_the_plan() -> None:
    def stage_two(*arguments: str) -> dict[str, float]:
        plan = json.loads(run("--json", "--size", "640x352", *arguments).stdout)
        return next(phase for phase in plan["phases"] if phase["name"] == "stage two")

    assert stage_two()["num_forwards"] == 4 * 7
    assert stage_two("--segment-size", "20", "--neighbors-before", "0")["num_forwards"] == 4
    assert stage_two("--frames", "161")["num_forwards"] == 4 * 14
    assert stage_two("--neighbors-before", "2")["num_tokens"] == 6 * 220


def test_guidance_of_stage_one_doubles_its_passes() -> None:
    def passes(*arguments: str) -> int:
        plan = json.loads(run("--json", "--size", "640x352", "--stage-one-steps", "40", *arguments).stdout)
        return next(phase["num_forwards"] for phase in plan["phases"] if phase["name"] == "stage one")

    assert passes("--stage-one-guidance", "3.5") == 2 * passes() == 80


def test_steps_are_the_checkpoints_unless_given() -> None:
    def steps(*arguments: str) -> int:
        return json.loads(run("--json", *arguments).stdout)["num_inference_steps"]

    assert steps() == 4
    assert steps("--model", "mini", "--size", "640x352") == 1
    assert steps("--model", "mini", "--size", "640x352", "--steps", "2") == 2


def test_smaller_weights() -> None:
    names = ("bfloat16", "float8", "int8", "nf4")
    plans = {name: json.loads(run("--json", "--dtype", name).stdout)["weight_bytes"] for name in names}
    assert plans["int8"] == plans["float8"]
    assert plans["float8"] * 2 == pytest.approx(plans["bfloat16"])
    assert plans["nf4"] * 16 == pytest.approx(plans["bfloat16"] * 4.25)


@pytest.mark.parametrize("memory", ["8GiB", "12GiB", "16GiB", "24GiB"])
def test_a_host_of_32_gigabytes_has_room_for_one_stage_at_a_time(memory: str) -> None:
    plan = json.loads(run("--json", "--memory", memory, "--host-memory", "28GiB").stdout)["memory"]
    assert plan["weight_dtypes"] == ["nf4", "float8" if memory in {"8GiB", "12GiB"} else "bfloat16"]
    assert plan["host_bytes"] < 28 * 2**30
    assert [phase["phase"] for phase in plan["phases"]] == ["text encoding", "stage one", "refinement"]
    said = run("--memory", memory, "--host-memory", "28GiB").stdout
    assert "given up - the stages are loaded one after the other" in said
    assert said.count("GiB in host memory") == 2


def test_a_host_of_64_gigabytes_keeps_stage_two_exact() -> None:
    plan = json.loads(run("--json", "--memory", "12GiB", "--host-memory", "60GiB").stdout)["memory"]
    assert plan["weight_dtypes"] == ["float8", "bfloat16"]
    plan = json.loads(run("--json", "--memory", "12GiB", "--host-memory", "65GiB").stdout)["memory"]
    assert plan["weight_dtypes"] == ["bfloat16", "bfloat16"]
    plan = json.loads(run("--json", "--memory", "12GiB", "--host-memory", "94GiB").stdout)["memory"]
    assert plan["weight_dtypes"] == ["bfloat16"], "there is room for both at once"


@pytest.mark.parametrize(("quantization", "gpu"), [("float8", "h200"), ("int8", "a100"), ("int8", "rtx3090")])
def test_products_in_eight_bits(quantization: str, gpu: str) -> None:
    given = ("--memory", "auto", "--gpu", gpu, "--quantization")
    plans = {name: json.loads(run("--json", *given, name).stdout) for name in ("none", quantization)}
    assert {name: plan["quantization"] for name, plan in plans.items()} == {name: name for name in plans}
    seconds = [plans[name]["memory"]["predicted_seconds"] for name in ("none", quantization)]
    assert 0.5 * seconds[0] < seconds[1] < 0.9 * seconds[0]
    assert plans[quantization]["weight_bytes"] < 0.62 * plans["none"]["weight_bytes"]
    assert f"bfloat16 weights, {quantization} products" in run("--quantization", quantization).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "100x100"), "the nearest is 96x96"),
        (("--size", "big"), "WIDTHxHEIGHT"),
        (("--frames", "80"), "4k+1"),
        (("--segment-size", "0"), "segment_size is 0"),
        (("--model", "sora"), "wan2.2, mini"),
        (("--dtype", "int3"), "bfloat16"),
        (("--gpu", "rtx3090", "--quantization", "float8", "--memory", "24GiB"), "use quantization int8 or none"),
        (("--steps", "0"), "at least 1"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_memory_plan_fits_its_budget_and_says_that_seconds_are_predicted() -> None:
    result = run("--memory", "16GiB")
    assert result.exit_code == 0
    assert "predicted for rtx4090, not measured" in result.stdout
    assert "given up - refinement: weights stream by block" in result.stdout
    plan = json.loads(run("--json", "--memory", "16GiB", "--gpu", "h200").stdout)["memory"]
    assert plan["peak_bytes"] <= 16 * 2**30
    assert plan["gpu"] == "h200"
    assert plan["predicted_seconds"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"]))
    assert "memory" not in json.loads(run("--json").stdout)


def test_a_memory_plan_fits_a_terminal_of_eighty_columns() -> None:
    result = CliRunner().invoke(app, ["plan", "--memory", "8GiB"], env={"COLUMNS": "80"})
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_small_model_needs_little() -> None:
    plan = json.loads(run("--json", "--model", "mini", "--memory", "auto").stdout)["memory"]
    assert {phase["placement"] for phase in plan["phases"]} == {"resident"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory", "2GiB"), "no plan fits into 2.0 GiB"),
        (("--memory", "10MiB"), "no plan fits into 10.0 MiB"),
        (("--memory", "much"), "write for instance 24GiB"),
        (("--memory", "24GiB", "--host-memory", "4GiB"), "host memory"),
        (("--memory", "24GiB", "--gpu", "abacus"), "rtx4090"),
    ],
)
def test_memory_refusals_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_memory_plan_of_one_stage() -> None:
    plans = {
        stage: json.loads(run("--json", "--memory", "80GiB", "--stage", stage).stdout)["memory"]
        for stage in ("one", "two", "both")
    }
    phases = {stage: [phase["phase"] for phase in plan["phases"]] for stage, plan in plans.items()}
    assert phases["one"] + phases["two"] == phases["both"] == ["text encoding", "stage one", "refinement"]
    assert {phase["placement"] for phase in plans["one"]["phases"]} == {"resident"}, "alone, Stage I fits"
    assert "resident" not in {phase["placement"] for phase in plans["both"]["phases"]}
    assert plans["one"]["host_bytes"] + plans["two"]["host_bytes"] == plans["both"]["host_bytes"]
    assert "64.05 GiB in host memory" in run("--memory", "80GiB", "--stage", "one").stdout


def test_the_light_decoder_is_planned_for() -> None:
    def decode(*arguments: str) -> dict[str, float]:
        plan = json.loads(run("--json", *arguments).stdout)
        return next(phase for phase in plan["phases"] if phase["name"] == "decode")

    exact, light = decode(), decode("--decoder", "light")
    assert light["tflop"] < exact["tflop"] / 150
    assert light["peak_bytes"] < exact["peak_bytes"] / 10
    refused = run("--model", "mini", "--decoder", "light")
    assert refused.exit_code != 0
    assert refused.stderr.startswith("error: light decoders are for the latents of Wan's codecs")
    assert "use decoder exact" in refused.stderr
