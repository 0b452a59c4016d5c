"""The pipeline of the tiny checkpoint, a picture, and a run of it from its beginning to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest

from swifti2v.pipelines.two_stage import TwoStagePipeline
from tests.pipelines.whole_runs import OPTIONS, segments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from swifti2v.pipelines.runs import GenerationRequest


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> TwoStagePipeline:
    """The tiny checkpoint as it is loaded, both stages on the CPU."""
    return TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def image() -> PIL.Image.Image:
    """A picture of another size and form than the videos."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((96, 72), PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def request_of(pipe: TwoStagePipeline, image: PIL.Image.Image) -> Callable[..., GenerationRequest]:
    """Ask for a video of `image` with some settings other than `OPTIONS`."""

    def make(prompt: str = "pan left", **changes: Any) -> GenerationRequest:
        return pipe.request(image, prompt, **{**OPTIONS, **changes})

    return make


@pytest.fixture(scope="module")
def uninterrupted(
    pipe: TwoStagePipeline, image: PIL.Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.Tensor, dict[str, bytes], Path]:
    """Frames, segment files and work directory of one run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("whole")
    video = pipe(image, "pan left", **OPTIONS, work_dir=folder)
    return video.frames, segments(folder), folder
