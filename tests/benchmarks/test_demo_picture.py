"""The picture at the head of the README shows what it says, for a run whose frames are known."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks import demo_picture
from benchmarks.pictures import GAP, LABEL_HEIGHT
from swifti2v.geometry import Size
from swifti2v.media.frame_store import FrameStore
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def photo() -> np.ndarray:
    """Detail in the right half only, so that it is known which place the sheet shows."""
    pixels = np.full((176, 640, 3), 128, np.uint8)
    pixels[:, 320:] = np.random.default_rng(0).integers(0, 256, (176, 320, 1), dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (0, 0), 1.0)


def test_panels_of_a_video_that_keeps_all_detail(
    tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    motion = cv2.resize(photo, (160, 44), interpolation=cv2.INTER_AREA)
    store = FrameStore(tmp_path / "run" / "motion_reference")
    store.append(np.stack([motion] * 5))
    store.complete({})
    with VideoWriter(tmp_path / "video.mp4", size=Size(640, 176), fps=16, crf=1) as writer:
        writer.write(np.stack([photo] * 5))
    given = [str(tmp_path / "photo.png"), str(tmp_path / "video.mp4"), "--work-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["demo_picture", *given, "--output", str(tmp_path / "demo.png")])
    demo_picture.main()

    sheet = np.asarray(Image.open(tmp_path / "demo.png")).astype(int)
    crop_width, crop_height = (side * demo_picture.CROP_ENLARGEMENT for side in demo_picture.CROP)
    top = sheet.shape[0] - GAP - crop_height
    there, coarse, paper, video = (
        sheet[top : top + crop_height, left : left + crop_width]
        for left in (GAP + index * (crop_width + GAP) for index in range(4))
    )
    assert np.abs(video - there).mean() < 3
    assert video.std() > 20  # a place of the right half
    assert np.abs(paper - there).mean() > 2 * np.abs(video - there).mean()
    # Four by four equal pixels, twice enlarged: Stage I's own.
    assert len(np.unique(np.diff(coarse, axis=1).any(axis=(0, 2)).nonzero()[0] % 8)) == 1
    assert sheet.shape[0] == GAP + 2 * (LABEL_HEIGHT + GAP) + 176 + crop_height
