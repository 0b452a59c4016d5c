"""Frames of a path: every one sampled once, from the picture and what continues it.

Sampling is at twice the size of the frames, and frames are reduced with the filter that reduces the picture itself; so
no frame is softer than frame 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
import torch

from swifti2v.geometry import Size
from swifti2v.mini.canvas import Canvas, Margins, continued

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from swifti2v.mini.path import MotionPath

FRAMES_PER_PIECE = 4
_SUPERSAMPLING = 2
_LARGEST_MARGIN = 0.45


def render_path(path: MotionPath, image: PIL.Image.Image, *, size: Size, num_frames: int) -> Iterator[Tensor]:
    """Yield the frames of a path over a picture, uint8 [n,h,w,3], frame 0 alone and then four at a time."""
    renderer = PathRenderer(path, image, size=size, num_frames=num_frames)
    yield torch.from_numpy(renderer.frame(0)[None])
    for first in range(1, num_frames, FRAMES_PER_PIECE):
        frames = [renderer.frame(index) for index in range(first, min(first + FRAMES_PER_PIECE, num_frames))]
        yield torch.from_numpy(np.stack(frames))


class PathRenderer:
    """Frames of a path, each from the picture itself and what continues it.

    Args:
        path: of `MotionPath.slowed`.
        image: RGB, at `size` or larger.
        size: of the frames.
        num_frames: of the clip, which decide how far the picture must be continued.
    """

    def __init__(self, path: MotionPath, image: PIL.Image.Image, *, size: Size, num_frames: int) -> None:
        self.path, self.size = path, size
        self._fine = Size(size.width * _SUPERSAMPLING, size.height * _SUPERSAMPLING)
        large = np.asarray(image.resize(self._fine, PIL.Image.Resampling.LANCZOS))
        small = np.asarray(image.resize(size, PIL.Image.Resampling.LANCZOS))
        self.canvas: Canvas = continued(small, self._margins(num_frames))
        self._painted, self._left, self._top = self.canvas.painted(large)

    def frame(self, index: int) -> NDArray[np.uint8]:
        """Return a frame, uint8 [h,w,3]."""
        fine = self._fine
        places = self.path.origins(index, self.size.width, self.size.height, area=fine)
        x = (places[..., 0] + 0.5) * fine.width - 0.5 + self._left
        y = places[..., 1] * fine.width + fine.height / 2 - 0.5 + self._top
        sampled = cv2.remap(
            self._painted,
            x.astype(np.float32),
            y.astype(np.float32),
            cv2.INTER_LANCZOS4,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        reduced = PIL.Image.fromarray(sampled).resize(self.size, PIL.Image.Resampling.LANCZOS)
        return np.array(reduced)  # a copy: tensors share it, and PIL's own cannot be written

    def _margins(self, num_frames: int) -> Margins:
        """Return how far beyond the picture any frame looks, by a few frames and a small grid."""
        width, height = self.size
        frames = np.unique(np.linspace(0, num_frames - 1, 33).round().astype(int))
        seen = np.stack([self.path.origins(int(frame), width, height, area=(40, 24)) for frame in frames])
        # The grid's outermost places are half a cell within the border.
        slack = np.array([0.5 / 40 * 1.7, 0.5 / 24 * height / width * 1.7])
        aspect = height / width
        low = np.maximum(-(seen.min(axis=(0, 1, 2)) - slack) - np.array([0.5, aspect / 2]), 0)
        high = np.maximum(seen.max(axis=(0, 1, 2)) + slack - np.array([0.5, aspect / 2]), 0)
        least = 0.02  # frame 0 needs nothing, and a sample's own neighborhood next to nothing
        moves = float(np.abs(seen - seen[:1]).max()) > 1e-4
        reach = [min(max(float(value), least if moves else 0.0), _LARGEST_MARGIN) for value in (*low, *high)]
        return Margins(reach[0], reach[1], reach[2], reach[3])
