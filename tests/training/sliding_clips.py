"""Videos for tests of training: blobs that slide to the left, each with its caption in a text file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from pathlib import Path

SIZE = Size(128, 128)


def write_clips(folder: Path, count: int, *, num_frames: int = 12, size: Size = SIZE) -> None:
    """Write ``0.mp4``, ``0.txt``, ``1.mp4``, ... at 8 frames a second."""
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (224, 160), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(folder / f"{seed}.mp4", size=size, fps=8) as writer:
            writer.write(np.stack([wide[16 : 16 + size.height, 4 * t : 4 * t + size.width] for t in range(num_frames)]))
        (folder / f"{seed}.txt").write_text("blobs slide to the left\n")
