"""Every recipe of the repository is one that its command can read, and says what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from swifti2v.config import load_yaml
from swifti2v.errors import ConfigurationError
from swifti2v.mini.recipes import StageOneRun, StageTwoRun
from swifti2v.training.light.run import LightRun
from swifti2v.training.low_res.run import LowResCacheRun, LowResLoraRun
from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {
    "light/light": LightRun,
    "mini/stage_one": StageOneRun,
    "mini/stage_two": StageTwoRun,
    "mini/context": StageTwoRun,
    "mini/transition": TransitionRun,
    "mini/refine": RefinerRun,
    "mini/distill": DistillationRun,
    "wan2.2/low_res_cache": LowResCacheRun,
    "wan2.2/stage_one_low_res_lora": LowResLoraRun,
    "wan2.2/transition": TransitionRun,
    "wan2.2/stage_two": RefinerRun,
    "wan2.2/distill": DistillationRun,
    "wan2.2/distill_distribution_matching": DistillationRun,
}


def names() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def test_every_recipe_is_listed_here() -> None:
    assert names() == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_recipe_is_read_by_its_command(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    assert isinstance(load_yaml(KINDS[name], path), KINDS[name])
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for part in ("command", "cost", "expected"):
        assert any(line.startswith(f"# {part} ") for line in header), part


def test_misspelt_key_names_the_right_one(tmp_path: Path) -> None:
    text = (RECIPES / "wan2.2" / "stage_two.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(text.replace("batch_size", "batchsize"))
    with pytest.raises(ConfigurationError, match="batch_size"):
        load_yaml(RefinerRun, tmp_path / "recipe.yaml")
