"""`swifti2v plan --train`: recipes of the full size as their headers say, ways to make them fit, one-line refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app

if TYPE_CHECKING:
    from click.testing import Result

RECIPES = Path(__file__).parents[2] / "recipes"
WAN = RECIPES / "wan2.2"
TRAININGS = ("stage_two", "distill", "distill_distribution_matching", "stage_one_low_res_lora")
CACHES = ("transition", "low_res_cache")


def run(recipe: Path, *arguments: str, columns: str = "80") -> Result:
    return CliRunner().invoke(app, ["plan", "--train", str(recipe), *arguments], env={"COLUMNS": columns})


def planned(recipe: Path, *arguments: str) -> dict[str, Any]:
    result = run(recipe, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def machines(recipe: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    return {machine["name"]: machine for machine in planned(recipe, *arguments)["machines"]}


def gibibytes(machine: dict[str, Any]) -> str:
    return f"{machine['memory']['peak_bytes'] / 2**30:.1f}"


def changed(folder: Path, name: str, *edits: tuple[str, str]) -> Path:
    text = (WAN / name).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TRAININGS)
def test_headers_state_what_is_counted(name: str) -> None:
    header = (WAN / f"{name}.yaml").read_text(encoding="utf-8")
    for machine, found in machines(WAN / f"{name}.yaml").items():
        (line,) = (line for line in header.splitlines() if line.startswith(f"#             {machine}"))
        assert f" {gibibytes(found)}" in line
        assert ("does not fit" in line) is not found["fits"]
    sharded = machines(WAN / f"{name}.yaml")["8x80 GB"]
    hours, experts = sharded["gpu_hours"], 2 if name == "stage_one_low_res_lora" else 1
    assert f"{hours / experts:,.1f} GPU-hours" in header
    assert f"{planned(WAN / f'{name}.yaml')['tflop_per_sample']:,.0f} TFLOP" in header


@pytest.mark.parametrize("name", CACHES)
def test_headers_of_caches_state_what_is_counted(name: str) -> None:
    header, plan = (WAN / f"{name}.yaml").read_text(encoding="utf-8"), planned(WAN / f"{name}.yaml")
    assert f"{plan['peak_bytes'] / 2**30:.1f} GiB on a card" in header
    assert f"{plan['tflop_per_clip']:,.0f} TFLOP a clip" in header
    fits = [machine["fits"] for machine in plan["machines"]]
    assert fits == [name == "low_res_cache", True, True]
    hours = next(each["gpu_hours_of_1000_clips"] for each in plan["machines"] if each["name"] == "1x80 GB")
    assert f"{hours:.1f} GPU-hours for" in header


@pytest.mark.parametrize(
    ("edits", "columns"),
    [
        ([("lora_rank: 0", "lora_rank: 64")], {"1x24 GB": "lora_rank 64", "1x80 GB": "lora_rank 64"}),
        ([("  num_steps: 10000", "  num_steps: 10000\n  optimizer: adamw8bit")], {"1x80 GB": "optimizer adamw8bit"}),
    ],
)
def test_what_a_header_names_as_a_way_fits(
    tmp_path: Path, edits: list[tuple[str, str]], columns: dict[str, str]
) -> None:
    """The recipe with that setting fits, in the memory that the header gives for it."""
    header = (WAN / "stage_two.yaml").read_text(encoding="utf-8")
    found = machines(changed(tmp_path, "stage_two.yaml", *edits))
    before = machines(WAN / "stage_two.yaml")
    for machine, words in columns.items():
        assert not before[machine]["fits"]
        assert [words.replace(" ", ": ")] in before[machine]["changes"]
        assert found[machine]["fits"]
        assert f"{words} ({gibibytes(found[machine])}" in header


def test_fewer_windows_on_fewer_cards_and_the_same_samples_for_the_lora() -> None:
    two, one = machines(WAN / "stage_two.yaml"), machines(WAN / "stage_one_low_res_lora.yaml")
    assert two["8x80 GB"]["num_samples"] == 8 * two["1x80 GB"]["num_samples"] == 80_000
    assert one["8x80 GB"]["num_samples"] == one["1x80 GB"]["num_samples"] == 2 * 1500 * 8


def test_context_parallel_divides_tokens_and_batches(tmp_path: Path) -> None:
    shared = changed(tmp_path, "stage_two.yaml", ("  num_steps: 10000", "  num_steps: 10000\n  context_parallel: 4"))
    alone, four = (machines(path)["8x80 GB"] for path in (WAN / "stage_two.yaml", shared))
    assert four["memory"]["activation_bytes"] == pytest.approx(alone["memory"]["activation_bytes"] / 4)
    assert four["num_samples"] == alone["num_samples"] // 4


def test_size_and_length_are_options() -> None:
    assert planned(WAN / "stage_two.yaml", "--size", "1280x704")["longest_sample_tokens"] == 6 * 880
    short = planned(WAN / "stage_two.yaml", "--frames", "13")
    assert short["longest_sample_tokens"] == 4 * 3520
    assert short["tflop_per_sample"] < planned(WAN / "stage_two.yaml")["tflop_per_sample"]
    assert planned(WAN / "stage_one_low_res_lora.yaml", "--frames", "33")["longest_sample_tokens"] == 9 * 880


@pytest.mark.parametrize("name", [*TRAININGS, *CACHES])
def test_tables_fit_a_terminal_of_eighty_columns(name: str) -> None:
    result = run(WAN / f"{name}.yaml")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("1x24 GB", "1x80 GB", "8x80 GB", "yes"):
        assert words in result.stdout


def test_what_does_not_fit_is_told_how_to() -> None:
    told = " ".join(run(WAN / "stage_two.yaml", columns="200").stdout.split())
    assert "1x24 GB would do with lora_rank: 64, or unchanged on 16 such cards, sharded" in told
    told = " ".join(run(WAN / "distill.yaml", columns="200").stdout.split())
    assert "1x24 GB would do with nothing that a recipe can set: take larger cards" in told


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("batch_size", "batchsize"), "unknown key 'batchsize'; did you mean 'batch_size'"),
        (("lora_rank: 0", "lora_rank: much"), "'much' is not int"),
        (("checkpoint: wan2.2", "checkpoint: nowhere"), "'nowhere' is not known"),
        (("lora_rank: 0", "lora_rank: 8\n  lora_targets: [to_q]"), "a LoRA on to_q is not counted"),
        (("loop:", "loop: ["), "is not YAML"),
        (("  num_steps: 10000", "  num_steps: 10000\n  optimizer: adam8"), "is not one of 'adamw', 'adamw8bit'"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, edit: tuple[str, str], words: str) -> None:
    refused(run(changed(tmp_path, "stage_two.yaml", edit)), words)


def test_other_refusals_are_one_line(tmp_path: Path) -> None:
    refused(run(tmp_path / "none.yaml"), "cannot read")
    refused(run(RECIPES / "mini" / "stage_two.yaml"), "trains the embedded model from the start")
    refused(run(WAN / "stage_two.yaml", "--frames", "18"), "use 4k+1 frames")


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
