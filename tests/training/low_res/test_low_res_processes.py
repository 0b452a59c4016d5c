"""The Low-Res LoRA under torchrun: two processes make one cache and one checkpoint, and one of them says so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.data.latent_cache import LatentCache
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.models.adapters import read_adapter_file
from swifti2v.models.checkpoints import resolve

if TYPE_CHECKING:
    from pathlib import Path

LOOP = {"num_steps": 2, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1, "bfloat16": False}


def run_on_two(*arguments: str | Path) -> str:
    """Run `swifti2v` on two processes and return what they printed; fail with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [str(argument) for argument in arguments]
    done = subprocess.run(  # noqa: S603 - our own command
        [*command, "-m", "swifti2v.cli.main", *given], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_from_videos_to_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    for seed in range(4):
        coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (224, 160), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(videos / f"{seed}.mp4", size=Size(128, 64), fps=8) as writer:
            writer.write(np.stack([wide[16:80, 4 * t : 4 * t + 128] for t in range(10)]))
        (videos / f"{seed}.txt").write_text("blobs slide to the left\n")
    recipe = tmp_path / "cache.json"
    size = {"width": 64, "height": 32, "max_aspect": 1.0, "fps": 8.0, "clips": {"num_frames": 9}}
    recipe.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "videos": size}))
    (line,) = run_on_two("train", "low-res-cache", recipe, "--data", videos, "-o", cache).splitlines()
    assert f"clips in {cache}, 0 skipped" in line  # 4, or 2 and "still missing", as the first ends last or not
    assert len(LatentCache.open(cache)) == 4
    checked = [json.loads(path.read_text())["videos"] for path in (cache / "checked").iterdir()]
    assert [len(share) for share in checked] == [2, 2]  # each process its own

    recipe = tmp_path / "lora.json"
    values = {"checkpoint": str(tiny_checkpoint), "samples_per_step": 4, "lora": {"rank": 2}, "loop": LOOP}
    recipe.write_text(json.dumps(values))
    lines = run_on_two("train", "stage-one", recipe, "--cache", cache, "-o", tmp_path / "run").splitlines()
    assert len(lines) == 2
    assert lines[-1].endswith(f"--model {tmp_path / 'run' / 'checkpoint'}")
    made = resolve(tmp_path / "run" / "checkpoint")
    for entry, path in zip(made.index.stage_one.adapters[2:], made.adapters[2:], strict=True):
        assert entry.role == "low_res"
        assert len(read_adapter_file(path).state_dict) == 20  # two matrices for each of ten layers
