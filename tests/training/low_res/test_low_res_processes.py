"""The Low-Res LoRA under torchrun: two processes make one cache and one checkpoint, and one of them says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from swifti2v.data.latent_cache import LatentCache
from swifti2v.geometry import Size
from swifti2v.wan.checkpoints import resolve
from swifti2v.wan.lora import read_adapter_file
from tests.training.sliding_clips import write_clips
from tests.training.torchrun import run_on_two

if TYPE_CHECKING:
    from pathlib import Path

LOOP = {"num_steps": 2, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1, "bfloat16": False}


@pytest.mark.slow
def test_from_videos_to_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    write_clips(videos, 4, num_frames=10, size=Size(128, 64))
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
