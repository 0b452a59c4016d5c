"""A frame that was cropped, reduced and recolored from a photo is found in it again; another photo is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.media.images import load_image
from swifti2v.reference.alignment import align

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXAMPLE = next((Path(__file__).parents[2] / "examples").glob("*.jpg"))


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    return cv2.resize(np.asarray(load_image(EXAMPLE).image), (1280, 720), interpolation=cv2.INTER_AREA)


def frame_of(photo: NDArray[np.uint8], box: tuple[int, int, int, int], width: int = 320) -> NDArray[np.uint8]:
    left, upper, right, lower = box
    height = round(width * (lower - upper) / (right - left))
    return cv2.resize(photo[upper:lower, left:right], (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    "box", [(0, 0, 1280, 720), (60, 20, 1200, 660), (100, 80, 1180, 680), (0, 8, 1280, 712), (320, 0, 960, 720)]
)
def test_a_crop_is_found_within_half_a_pixel_of_the_frame(photo, box) -> None:
    found = align(photo, frame_of(photo, box))
    scale = (box[2] - box[0]) / 320
    assert np.abs(np.subtract(found.box, box)).max() / scale < 0.5
    assert found.gain == (1.0, 1.0, 1.0)


def test_damage_and_another_exposure_are_seen_through(photo) -> None:
    box = (60, 20, 1200, 660)
    frame = cv2.GaussianBlur(frame_of(photo, box), (0, 0), 0.8).astype(np.float32) / 255
    frame = np.clip(frame * [1.05, 0.97, 1.0] + [0.01, 0.0, -0.02], 0, 1)
    frame += np.random.default_rng(0).normal(0, 0.01, frame.shape)
    found = align(photo, np.clip(frame * 255, 0, 255).astype(np.uint8))
    assert np.abs(np.subtract(found.box, box)).max() / 3.6 < 0.5
    recolored = found.recolored(np.clip(frame * 255, 0, 255).astype(np.uint8)).astype(np.float32)
    difference = recolored.mean(axis=(0, 1)) - frame_of(photo, box).astype(np.float32).mean(axis=(0, 1))
    assert np.abs(difference).max() < 1.0
    assert len(found.notes) == 2


def test_a_photo_that_does_not_belong_is_refused(photo) -> None:
    other = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    with pytest.raises(InvalidInputError) as caught:
        align(photo, cv2.resize(other, (320, 180), interpolation=cv2.INTER_CUBIC))
    assert caught.value.param == "image"
    with pytest.raises(InvalidInputError):
        align(photo, frame_of(photo, (0, 0, 1280, 720))[:, ::-1].copy())


def test_a_video_that_shows_more_than_the_photo_is_refused(photo) -> None:
    with pytest.raises(InvalidInputError) as caught:
        align(photo[40:640, 100:1180].copy(), frame_of(photo, (0, 0, 1280, 720)))
    assert caught.value.param == "image"
