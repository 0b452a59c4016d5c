"""A foreign video and its photo: found in each other, refined, cut back to the size asked for; resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import InvalidInputError, WorkDirectoryError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.runner.refine import VideoRefiner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.runs import FinishedFrames

EXAMPLE = next((Path(__file__).parents[2] / "examples").glob("*.jpg"))
NUM_FRAMES = 19  # not 4k+1, and more than one segment


@pytest.fixture(scope="module")
def photo() -> PIL.Image.Image:
    return PIL.Image.open(EXAMPLE).convert("RGB").resize((512, 288), PIL.Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def truth(photo: PIL.Image.Image) -> np.ndarray:
    """The photo under a camera that pans by a pixel a frame, uint8 [F,256,448,3]."""
    pixels = np.asarray(photo)
    return np.stack([pixels[16:272, 8 + t : 456 + t] for t in range(NUM_FRAMES)])


@pytest.fixture(scope="module")
def motion(truth: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("motion") / "motion.mp4"
    small = [cv2.resize(frame, (112, 64), interpolation=cv2.INTER_AREA) for frame in truth]
    with VideoWriter(path, size=Size(112, 64), fps=12) as writer:
        writer.write(np.stack(small))
    return path


def frames_of(pieces: Iterator[FinishedFrames]) -> torch.Tensor:
    return torch.cat([piece.frames for piece in pieces])


def psnr(made: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((made.astype(float) - truth.astype(float)) ** 2)))


@pytest.fixture(scope="module")
def refiner() -> VideoRefiner:
    return VideoRefiner("cpu")


@pytest.fixture(scope="module")
def refined(refiner: VideoRefiner, motion: Path, photo: PIL.Image.Image) -> torch.Tensor:
    return refiner(motion, photo, size=(448, 256)).frames


def test_the_photos_detail_is_brought_to_every_frame(refined: torch.Tensor, truth: np.ndarray) -> None:
    assert refined.shape == (NUM_FRAMES, 256, 448, 3)
    enlarged = [
        cv2.resize(
            cv2.resize(frame, (112, 64), interpolation=cv2.INTER_AREA), (448, 256), interpolation=cv2.INTER_CUBIC
        )
        for frame in truth
    ]
    margin = np.s_[1:, 8:-8, 24:-24]
    assert psnr(refined.numpy()[margin], truth[margin]) > psnr(np.stack(enlarged)[margin], truth[margin]) + 1


def test_a_size_that_does_not_divide_is_cut_back(refiner: VideoRefiner, motion: Path, photo: PIL.Image.Image) -> None:
    request = refiner.request(motion, photo, size="450x250", max_frames=5)
    assert request.work_size == Size(480, 256)
    assert frames_of(refiner.stream(request)).shape == (5, 250, 450, 3)


def test_a_stopped_run_goes_on_to_the_same_frames(
    refiner: VideoRefiner, motion: Path, photo: PIL.Image.Image, refined: torch.Tensor, tmp_path: Path
) -> None:
    request = refiner.request(motion, photo, size=(448, 256))
    pieces = refiner.stream(request, work_dir=tmp_path)
    for _ in range(5):  # frame 0, a whole segment of three latent frames, and one more
        next(pieces)
    pieces.close()
    assert list((tmp_path / "segments").iterdir())
    assert torch.equal(frames_of(refiner.stream(request, work_dir=tmp_path)), refined)
    other = refiner.request(motion, photo, size=(448, 256), max_frames=9)
    with pytest.raises(WorkDirectoryError):
        next(refiner.stream(other, work_dir=tmp_path))


def test_what_cannot_be_refined_is_refused(refiner: VideoRefiner, motion: Path, photo: PIL.Image.Image) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (36, 64, 3), dtype=np.uint8)
    other = PIL.Image.fromarray(noise).resize((512, 288), PIL.Image.Resampling.BICUBIC)
    for image, size, param in ((other, None, "image"), (photo, (64, 32), "size"), (photo, "wide", "size")):
        with pytest.raises(InvalidInputError) as caught:
            refiner.request(motion, image, size=size)
        assert caught.value.param == param
