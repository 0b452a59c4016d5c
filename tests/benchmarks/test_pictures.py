"""The places that pictures show, and their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from benchmarks.pictures import (
    GAP,
    LABEL_HEIGHT,
    Panel,
    Place,
    enlarged,
    followed,
    most_different_place,
    row,
    save,
    sheet,
)
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from pathlib import Path


def test_the_place_of_a_planted_difference_is_found() -> None:
    first = np.random.default_rng(0).integers(100, 110, (60, 90, 3), dtype=np.uint8)
    second = first.copy()
    second[31:41, 52:64] += 50
    place = most_different_place(first, second, Size(12, 10))
    assert place == Place(52, 31, 12, 10)
    assert place.of(second).min() >= 150


def test_content_is_followed_back_to_the_image() -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (80, 140, 3)), (0, 0), 2)
    texture = ((texture - texture.min()) / np.ptp(texture) * 255).astype(np.uint8)
    image, frame = texture[:, 10:110], texture[:, 14:114]  # content moves 4 to the left
    assert followed(Place(40, 20, 30, 30), image, frame) == Place(44, 20, 30, 30)
    assert followed(Place(70, 20, 30, 30), image, frame).left == 70


def test_rows_and_sheets_hold_every_pixel(tmp_path: Path) -> None:
    red, blue = np.zeros((10, 40, 3), np.uint8), np.zeros((20, 30, 3), np.uint8)
    red[..., 0] = 255
    blue[..., 2] = 255
    made = row([Panel("one", red), Panel("two", enlarged(blue, 2))])
    assert made.shape == (40 + LABEL_HEIGHT, 40 + GAP + 60, 3)
    assert (made[LABEL_HEIGHT:, 40 + GAP :] == (0, 0, 255)).all()
    both = sheet([made, made[:, :50]])
    assert both.shape == (2 * (made.shape[0] + GAP), made.shape[1], 3)
    path = save(both, tmp_path / "folder" / "sheet.png")
    with Image.open(path) as picture:
        assert picture.size == (both.shape[1] + 2 * GAP, both.shape[0] + GAP)
