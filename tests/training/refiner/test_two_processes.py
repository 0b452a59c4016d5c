"""The commands under torchrun: two processes share clips, batches and weights, and neither waits for ever."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from swifti2v.data.latent_cache import LatentCache
from swifti2v.wan.transformer import StageTwoTransformer
from tests.training.sliding_clips import write_clips
from tests.training.torchrun import run_on_two

if TYPE_CHECKING:
    from pathlib import Path

LOOP = {
    "num_steps": 3, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 3, "validate_every": 2,
    "log_every": 1, "bfloat16": False,
}  # fmt: skip


@pytest.mark.slow
def test_transition_then_sharded_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_clips(videos, 4, num_frames=10)
    transition = tmp_path / "transition.yaml"
    size = {"width": 128, "height": 128, "max_aspect": 1.0, "fps": 8.0, "clips": {"num_frames": 9}}
    encoding = {"modes": ["transport"], "transition": {"num_variants": 1}}
    transition.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "videos": size, "encoding": encoding}))
    run_on_two("train", "transition", transition, "--data", videos, "-o", tmp_path / "cache")
    assert len(LatentCache.open(tmp_path / "cache")) == 4

    recipe = tmp_path / "stage_two.yaml"
    values = {
        "checkpoint": str(tiny_checkpoint),
        "loop": LOOP,
        "flow": {"own_context_share": 0.5},  # forwards beside the step's own, in which both processes have to meet
        "validation": {"num_samples": 1, "num_steps": 1},  # one clip: the second process repeats it
    }
    recipe.write_text(json.dumps(values))
    run_on_two("train", "stage-two", recipe, "--cache", tmp_path / "cache", "-o", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("validation/gained_decibels" in line for line in lines)
    folder = tmp_path / "run" / "checkpoint" / "stage_two" / "transformer"
    trained = StageTwoTransformer.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    before = StageTwoTransformer.from_pretrained(tiny_checkpoint / "stage_two" / "transformer").state_dict()
    assert trained.keys() == before.keys()
    assert all(trained[name].shape == before[name].shape for name in before)
    assert any(not torch.equal(trained[name], before[name]) for name in before)
