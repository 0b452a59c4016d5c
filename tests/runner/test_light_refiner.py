"""The refiner `light` in the pipeline: Stage I of any checkpoint before it, Stage II never loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import GenerationCancelled, InvalidInputError, WorkDirectoryError
from swifti2v.runner.fitting import MemoryLimits
from swifti2v.runner.two_stage import TwoStagePipeline
from tests.runner.whole_runs import frames_of

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runs import Progress

OPTIONS: dict[str, Any] = {"num_frames": 13, "seed": 3, "stage_one_steps": 1, "segment_size": 1, "refiner": "light"}


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((64, 64), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, picture: PIL.Image.Image) -> torch.Tensor:
    """What both loaded stages make."""
    return TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")(picture, **OPTIONS).frames


def test_frame_0_is_the_image(expected: torch.Tensor, picture: PIL.Image.Image) -> None:
    assert expected.shape == (13, 64, 64, 3)
    assert np.array_equal(expected[0].numpy(), np.asarray(picture))


@pytest.mark.parametrize("memory", [None, MemoryLimits(), MemoryLimits(2**33, 2**33)])
def test_stage_two_is_not_loaded(
    tiny_checkpoint: Path, picture: PIL.Image.Image, expected: torch.Tensor, memory: MemoryLimits | None
) -> None:
    pipeline = TwoStagePipeline.describe(tiny_checkpoint, device="cpu", memory=memory)
    request = pipeline.request(picture, **OPTIONS)
    in_turn = frames_of(pipeline.stream(request))
    pipeline.load(request.settings)
    assert pipeline.parts.stages == ("stage_one",)
    assert next(pipeline.parts.stage_two.transformer.parameters()).is_meta
    assert torch.equal(frames_of(pipeline.stream(request)), expected)
    assert torch.equal(in_turn, expected)
    with pytest.raises(InvalidInputError):
        next(pipeline.stream(pipeline.request(picture, **OPTIONS | {"refiner": "concat"})))


def test_progress_and_a_stopped_run(
    tiny_checkpoint: Path, picture: PIL.Image.Image, expected: torch.Tensor, tmp_path: Path
) -> None:
    pipeline = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu", memory=MemoryLimits())
    request = pipeline.request(picture, **OPTIONS)
    told: list[Progress] = []

    def stop_after_two(progress: Progress) -> None:
        if progress.phase == "stage_two":
            told.append(progress)
            if progress.done == 2:
                msg = "enough"
                raise GenerationCancelled(msg)

    with pytest.raises(GenerationCancelled):
        frames_of(pipeline.stream(request, work_dir=tmp_path, on_progress=stop_after_two))
    assert [(each.done, each.total, each.segment, each.num_segments) for each in told] == [(1, 3, 1, 3), (2, 3, 2, 3)]
    more: list[Progress] = []
    # What only Stage II's networks read may be set otherwise: nothing of `light` hangs on it.
    again = pipeline.request(picture, **OPTIONS, num_inference_steps=7, neighbors_before=0)
    assert torch.equal(frames_of(pipeline.stream(again, work_dir=tmp_path, on_progress=more.append)), expected)
    assert [each.done for each in more if each.phase == "stage_two"] == [3]
    for other in ({"segment_size": 2}, {"refiner": "concat"}, {"flow_scale": 0.25}):
        with pytest.raises(WorkDirectoryError):
            next(pipeline.stream(pipeline.request(picture, **OPTIONS | other), work_dir=tmp_path))
