"""Where the host has room for one stage, stages are loaded in turn, and the video is that of both at once."""

from __future__ import annotations

import gc
import weakref
from itertools import groupby
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import MemoryBudgetError, WorkDirectoryError
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.ways import stored_bytes
from swifti2v.runner import two_stage
from swifti2v.runner.fitting import networks_of
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.checkpoints import PARTS
from tests.runner.whole_runs import frames_of

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runner.parts import Parts
    from swifti2v.runs import Progress

OPTIONS = {"num_frames": 13, "seed": 3, "stage_one_steps": 1, "num_inference_steps": 2, "segment_size": 1}
IMAGE = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was loaded, in order; at each load nothing of an earlier one may be alive."""
    stages: list[tuple[str, ...]] = []
    alive: list[weakref.ref[torch.nn.Module]] = []

    def load(*arguments: Any, **options: Any) -> Parts:
        gc.collect()
        assert not [network for network in alive if network() is not None]
        parts = load_parts(*arguments, **options)
        stages.append(parts.stages)
        alive.extend(map(weakref.ref, parts.transformers))
        return parts

    monkeypatch.setattr(two_stage, "load_parts", load)
    return stages


def room_for_one(checkpoint: Path) -> MemoryLimits:
    """Host memory for the larger stage in float32, and not for both."""
    parts = load_parts(checkpoint, device="cpu", stages=())
    stages = [load_parts(checkpoint, device="cpu", stages=(stage,)) for stage in PARTS]
    needed = max(stored_bytes(networks_of(each), "float32") for each in stages)
    assert not parts.transformers
    return MemoryLimits(2**30, needed + 2**10)


@pytest.mark.parametrize("has_work_dir", [True, False])
def test_the_video_is_that_of_both_stages_at_once(
    tiny_checkpoint: Path, tmp_path: Path, loads: list[tuple[str, ...]], has_work_dir: bool
) -> None:
    whole = TwoStagePipeline(load_parts(tiny_checkpoint, device="cpu", memory=MemoryLimits(2**30)))
    expected = frames_of(whole.stream(whole.request(IMAGE, "pan left", **OPTIONS)))

    pipeline = TwoStagePipeline.describe(tiny_checkpoint, device="cpu", memory=room_for_one(tiny_checkpoint))
    phases: list[Progress] = []
    request = pipeline.request(IMAGE, "pan left", **OPTIONS)
    pipeline.load(request.settings)
    assert pipeline.loads_in_turn
    work_dir = tmp_path / "work" if has_work_dir else None
    actual = frames_of(pipeline.stream(request, work_dir=work_dir, on_progress=phases.append))

    assert torch.equal(actual, expected)
    assert loads == [(), ("stage_one",), ("stage_two",)]
    first, *others = (phase for phase, _ in groupby(each.phase for each in phases))
    assert first == "stage_one"
    assert set(others) == {"stage_two", "frames"}


def test_finished_work_is_not_done_again(tiny_checkpoint: Path, tmp_path: Path, loads: list[tuple[str, ...]]) -> None:
    pipeline = TwoStagePipeline.describe(tiny_checkpoint, device="cpu", memory=room_for_one(tiny_checkpoint))
    request = pipeline.request(IMAGE, "pan left", **OPTIONS)
    assert frames_of(pipeline.preview(request, work_dir=tmp_path)).shape == (13, 16, 16, 3)
    pieces = pipeline.stream(request, work_dir=tmp_path)
    first = next(pieces).frames
    pieces.close()
    video = frames_of(pipeline.stream(request, work_dir=tmp_path))
    assert loads == [(), ("stage_one",), ("stage_two",), ("stage_two",)]
    assert torch.equal(video[: len(first)], first)
    with pytest.raises(WorkDirectoryError, match="another prompt"):
        next(pipeline.stream(pipeline.request(IMAGE, "pan right", **OPTIONS), work_dir=tmp_path))
    assert len(loads) == 4, "refused before anything is loaded"


def test_both_are_loaded_where_there_is_room(tiny_checkpoint: Path) -> None:
    for limits in (None, MemoryLimits(2**30), MemoryLimits(2**30, 2**30)):
        pipeline = TwoStagePipeline.describe(tiny_checkpoint, device="cpu", memory=limits)
        pipeline.load(pipeline.request(IMAGE, **OPTIONS).settings)
        assert not pipeline.loads_in_turn
        assert pipeline.parts.stages == PARTS


def test_too_little_for_a_stage_is_refused_before_anything_is_loaded(
    tiny_checkpoint: Path, loads: list[tuple[str, ...]]
) -> None:
    pipeline = TwoStagePipeline.describe(tiny_checkpoint, device="cpu", memory=MemoryLimits(2**30, 2**10))
    with pytest.raises(MemoryBudgetError):
        pipeline.load(pipeline.request(IMAGE, **OPTIONS).settings)
    assert loads == [()]
