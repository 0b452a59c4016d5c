"""The commands under torchrun: two processes share clips, batches and weights, and neither waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from swifti2v.data.latent_cache import LatentCache
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.models.transformer import StageTwoTransformer

LOOP = {
    "num_steps": 3, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 3, "validate_every": 2,
    "log_every": 1, "bfloat16": False,
}  # fmt: skip


def run_on_two(*arguments: str | Path) -> None:
    """Run `swifti2v` on two processes; fail with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [str(argument) for argument in arguments]
    done = subprocess.run(  # noqa: S603 - our own command
        [*command, "-m", "swifti2v.cli.main", *given], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_transition_then_sharded_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for seed in range(4):
        coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (224, 160), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(videos / f"{seed}.mp4", size=Size(128, 128), fps=8) as writer:
            writer.write(np.stack([wide[16:144, 4 * t : 4 * t + 128] for t in range(10)]))
        (videos / f"{seed}.txt").write_text("blobs slide to the left\n")
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
