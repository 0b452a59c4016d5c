"""docs/guides/few_steps.md: its indexes are read, and give each network the noise levels that it was distilled at."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.wan.checkpoint_index import CheckpointIndex

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "few_steps.md").read_text(encoding="utf-8")
FAST, TURBO = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL))

# Of FastVideo, `dmd_denoising_steps` of FastWan2_2_TI2V_5B_Config in fastvideo/configs/pipelines/wan.py; of Turbo,
# configs/inference/wan22.yaml, which does not warp its steps. Timesteps of 1000.
FAST_TIMESTEPS = (757, 522)
TURBO_TIMESTEPS = (500, 250)


@pytest.mark.parametrize(
    ("index", "timesteps"),
    [(FAST, FAST_TIMESTEPS), (FAST | {"stage_two": TURBO}, TURBO_TIMESTEPS)],
    ids=["FastWan", "Turbo"],
)
def test_index_of_the_guide_samples_at_the_levels_of_the_distillation(
    index: dict[str, Any], timesteps: tuple[int, ...]
) -> None:
    settings = CheckpointIndex.from_json(index).default_settings()
    assert (settings.refiner, settings.solver, settings.guidance_scale) == ("training-free", "renoise", 1.0)
    sigmas = shifted_sigmas(settings.num_inference_steps, shift=settings.flow_shift, start=settings.sigma_start)
    assert sigmas == pytest.approx([*(timestep / 1000 for timestep in timesteps), 0.0], abs=1e-4)


def test_stage_one_of_the_guide_is_that_of_the_preset() -> None:
    preset = Path(__file__).parents[2] / "src" / "swifti2v" / "presets" / "wan2.2" / "swifti2v.json"
    shipped = CheckpointIndex.from_json(json.loads(preset.read_text(encoding="utf-8")))
    assert CheckpointIndex.from_json(FAST).stage_one == shipped.stage_one
    assert shipped.stage_two.solver == "euler"
