"""Real clips with known truth: those of an index that training never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swifti2v.data.sources import read_index
from swifti2v.errors import ConfigurationError
from swifti2v.media.video_reader import VideoReader

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.data.sources import MediaItem
    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]

# Training holds wider clips back (`swifti2v.mini.recipes.SourceOptions.max_clip_width`).
MIN_HELD_BACK_WIDTH = 1152
REDUCTION = 4


def held_back_clips(folder: Path, *, min_width: int = MIN_HELD_BACK_WIDTH) -> list[MediaItem]:
    """Return the clips of ``folder/INDEX.csv`` at least `min_width` pixels wide, in the index's order.

    Raises:
        ConfigurationError: there is no such index, or no such clip in it.
    """
    items = read_index(folder / "INDEX.csv")
    wide = [item for item in items if item.kind == "clip" and item.width >= min_width]
    if not wide:
        msg = f"{folder / 'INDEX.csv'} names no clip at least {min_width} pixels wide; add one, or use another index"
        raise ConfigurationError(msg)
    return wide


def truth_frames(path: Path, size: Size, num_frames: int) -> Array:
    """Return the first frames of a clip, cropped at the center: uint8 [F, H, W, 3], F = 4k+1 and at most `num_frames`.

    Raises:
        ConfigurationError: the clip is smaller than `size`.
    """
    reader = VideoReader(path, max_frames=num_frames)
    left, top = ((have - want) // 2 for have, want in zip(reader.info.size, size, strict=True))
    if min(left, top) < 0:
        msg = f"{path.name} is {reader.info.size}, smaller than {size}; choose a smaller size or wider clips"
        raise ConfigurationError(msg)
    cropped = [frame[top : top + size.height, left : left + size.width].copy() for frame in reader.frames()]
    return np.stack(cropped[: (len(cropped) - 1) // 4 * 4 + 1])
