"""The small pictures of a video: its first frame, and a sheet of frames from all over it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import PIL.Image

from swifti2v.media.atomic_files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

THUMBNAIL_SIDE = 480
SPRITE_SIDE = 160
MAX_SPRITES = 16
_QUALITY = 85


def save_thumbnail(frame: NDArray[np.uint8], path: Path) -> None:
    """Write a frame, uint8 [H,W,3], as a JPEG of at most `THUMBNAIL_SIDE` pixels a side."""
    _save(_shrunk(frame, THUMBNAIL_SIDE), path)


class Spritesheet:
    """At most `MAX_SPRITES` frames, evenly from the first to the last, in rows from the top left.

    Args:
        num_frames: of the video.
    """

    def __init__(self, num_frames: int) -> None:
        count = min(num_frames, MAX_SPRITES)
        self._wanted = [round(number * (num_frames - 1) / max(count - 1, 1)) for number in range(count)]
        self._sprites: dict[int, PIL.Image.Image] = {}

    def add(self, frames: NDArray[np.uint8], *, first_frame: int) -> None:
        """Take what the sheet needs of `frames`, uint8 [n,H,W,3], whose first is frame `first_frame`."""
        for index in self._wanted:
            if first_frame <= index < first_frame + len(frames):
                self._sprites[index] = _shrunk(frames[index - first_frame], SPRITE_SIDE)

    def save(self, path: Path) -> None:
        """Write the sheet as a JPEG; nothing if no frame was added."""
        if not self._sprites:
            return
        width, height = next(iter(self._sprites.values())).size
        columns = math.ceil(math.sqrt(len(self._wanted)))
        rows = math.ceil(len(self._wanted) / columns)
        sheet = PIL.Image.new("RGB", (columns * width, rows * height))
        for place, index in enumerate(self._wanted):
            if index in self._sprites:
                sheet.paste(self._sprites[index], (place % columns * width, place // columns * height))
        _save(sheet, path)


def _shrunk(frame: NDArray[np.uint8], side: int) -> PIL.Image.Image:
    """Return a frame of at most `side` pixels a side."""
    height, width = frame.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # OpenCV reads a frame where it is; Pillow would copy all of it first.
    return PIL.Image.fromarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame)


def _save(image: PIL.Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="JPEG", quality=_QUALITY))
