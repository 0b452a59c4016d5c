"""`swifti2v plan --train`: recipes of the full size as their headers say, tables, one-line refusals."""

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
REFINE = RECIPES / "mini" / "refine.yaml"


def run(recipe: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--train", str(recipe), *arguments], env={"COLUMNS": "80"})


def planned(recipe: Path, *arguments: str) -> dict[str, Any]:
    result = run(recipe, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage_two", "stage_one_low_res_lora"])
def test_headers_of_trainings_state_what_is_measured(name: str) -> None:
    header, plan = (WAN / f"{name}.yaml").read_text(encoding="utf-8"), planned(WAN / f"{name}.yaml")
    for found in plan["machines"]:
        (line,) = (line for line in header.splitlines() if line.startswith(f"#             {found['name']}"))
        assert f" {found['memory']['peak'] / 2**30:.1f}" in line
        assert ("does not fit" in line) is not found["fits"]
    hours, experts = plan["machines"][-1]["gpu_hours"], 2 if name == "stage_one_low_res_lora" else 1
    assert f"{hours / experts:,.1f} GPU-hours" in header
    assert f"{plan['tflop_per_sample']:,.0f} TFLOP" in header


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transition", "low_res_cache"])
def test_headers_of_caches_state_what_is_measured(name: str) -> None:
    header, plan = (WAN / f"{name}.yaml").read_text(encoding="utf-8"), planned(WAN / f"{name}.yaml")
    assert f"{plan['peak_bytes'] / 2**30:.1f} GiB on a card" in header
    assert f"{plan['tflop_per_clip']:,.0f} TFLOP a clip" in header
    assert [machine["fits"] for machine in plan["machines"]] == [name == "low_res_cache", True, True]


def test_size_and_length_are_options_and_more_cards_see_more_windows() -> None:
    small = planned(REFINE, "--size", "128x96", "--frames", "17")
    large = planned(REFINE, "--size", "256x96", "--frames", "17")
    assert large["longest_sample_tokens"] == 2 * small["longest_sample_tokens"]
    assert large["tflop_per_sample"] > small["tflop_per_sample"]
    one, _, eight = small["machines"]
    assert eight["num_samples"] == 8 * one["num_samples"]
    assert all(found["fits"] for found in small["machines"])


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    result = run(REFINE, "--size", "128x96", "--frames", "17")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "edit", [("batch_size", "batchsize"), ("checkpoint: wan2.2", "checkpoint: none"), ("loop:", "[")]
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, edit: tuple[str, str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((WAN / "stage_two.yaml").read_text(encoding="utf-8").replace(*edit), encoding="utf-8")
    refused(run(path))


def test_other_refusals_are_one_line(tmp_path: Path) -> None:
    refused(run(tmp_path / "none.yaml"))
    refused(run(RECIPES / "mini" / "stage_two.yaml"))
    refused(run(WAN / "stage_two.yaml", "--frames", "18"))


def refused(result: Result) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
