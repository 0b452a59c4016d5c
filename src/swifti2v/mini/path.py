"""The form of motion in `mini`: one smooth path over the whole clip, so that nothing can lurch.

A camera that moves at constant rates (pan, zoom, roll: a one-parameter group, exact for each of them), and motion of
the scene in the picture of frame 0: a steady one and two waves, each with a frequency of its own. All of it is zero at
frame 0, has no seam anywhere, and goes on for as many frames as one likes.

Places are in widths of the picture, x to the right and y down, (0, 0) at the center; times in units of
`REFERENCE_FRAMES` frames. A displacement tells, for a pixel of frame t, where it was in frame 0 minus where it is.

Shape suffixes: B batch, C channels, h w cells of the grid, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]

REFERENCE_FRAMES = 80
"""Rates are what happens over this many frames (a clip of 81)."""

CAMERA_RATES = ("pan_x", "pan_y", "zoom", "roll")
WAVES = ("sway", "ripple")
MAP_CHANNELS = 2 + 4 * len(WAVES)
"""Steady x, y; then of each wave: sine x, y, cosine x, y."""

# What a clip may add up to, whatever its length: beyond that too little of the picture would be left.
LARGEST_PAN = (0.40, 0.26)
LARGEST_ZOOM_IN = math.log(2.2)
LARGEST_ZOOM_OUT = math.log(1.65)
LARGEST_ROLL = math.radians(45)
LARGEST_STEADY = 0.40


@dataclass(frozen=True)
class MotionPath:
    """Motion of a clip.

    Args:
        camera: [4] float32: pan x, pan y in widths; zoom, the logarithm of the growth; roll in radians, clockwise.
        cycles: [2] float32: of sway and ripple per `REFERENCE_FRAMES` frames.
        maps: [10,h,w] float32, in widths, on a grid of cells over frame 0.
    """

    camera: FloatArray
    cycles: FloatArray
    maps: FloatArray

    def slowed(self, num_frames: int) -> tuple[MotionPath, float]:
        """Return the path that a clip of `num_frames` has room for, and by what share it is slower (1: not at all)."""
        time = (num_frames - 1) / REFERENCE_FRAMES
        pan_x, pan_y, zoom, roll = (abs(float(rate)) * time for rate in self.camera)
        growth = LARGEST_ZOOM_IN if self.camera[2] > 0 else LARGEST_ZOOM_OUT
        steady = float(np.percentile(np.abs(self.maps[:2]), 99)) * time
        limits = (*LARGEST_PAN, growth, LARGEST_ROLL, LARGEST_STEADY)
        excess = max(amount / limit for amount, limit in zip((pan_x, pan_y, zoom, roll, steady), limits, strict=True))
        share = min(1.0, 1 / excess) if excess > 0 else 1.0
        if share == 1:
            return self, 1.0
        maps = self.maps.copy()
        maps[:2] *= share
        return replace(self, camera=self.camera * np.float32(share), maps=maps), share

    def origins(self, frame: int, width: int, height: int, *, area: tuple[int, int] | None = None) -> FloatArray:
        """Return where each pixel of a frame was in frame 0: [H,W,2] in widths from the center.

        Args:
            frame: index.
            width: of the picture.
            height: of the picture; both fix the scale.
            area: pixels of the grid that is asked for, if it is another than the picture's own.
        """
        columns, rows = area or (width, height)
        x = ((np.arange(columns, dtype=np.float32) + 0.5) / columns - 0.5).astype(np.float32)
        y = (((np.arange(rows, dtype=np.float32) + 0.5) / rows - 0.5) * (height / width)).astype(np.float32)
        seen = self._through_camera(x[None, :] + 1j * y[:, None], frame / REFERENCE_FRAMES)
        points = np.stack([seen.real, seen.imag], axis=-1).astype(np.float32)
        local = self._local_map(frame / REFERENCE_FRAMES)
        return points if local is None else points + _sampled(local, points, height / width)

    def travel(self, num_frames: int, width: int, height: int) -> float:
        """Return the greatest displacement of any place over a clip, in widths of the picture."""
        area = (16, 10)
        still = self.origins(0, width, height, area=area)
        frames = np.unique(np.linspace(0, num_frames - 1, 25).round().astype(int))
        lengths = [
            np.linalg.norm(self.origins(int(frame), width, height, area=area) - still, axis=-1) for frame in frames
        ]
        return float(np.percentile(np.max(lengths, axis=0), 95))

    def _through_camera(self, places: NDArray[np.complex64], time: float) -> NDArray[np.complex64]:
        """Places of frame 0 that are seen at `places` after `time`."""
        pan_x, pan_y, zoom, roll = (float(rate) for rate in self.camera)
        generator = complex(-zoom, -roll)
        factor = np.exp(generator * time)
        way = complex(pan_x, pan_y) * ((factor - 1) / generator if abs(generator) > 1e-6 else time)
        return (places * factor + way).astype(np.complex64)

    def _local_map(self, time: float) -> FloatArray | None:
        if not self.maps.any():
            return None
        total = self.maps[:2] * np.float32(time)
        for wave, cycles in enumerate(self.cycles):
            sine, cosine = self.maps[2 + 4 * wave : 4 + 4 * wave], self.maps[4 + 4 * wave : 6 + 4 * wave]
            phase = 2 * math.pi * float(cycles) * time
            total = total + sine * np.float32(math.sin(phase)) + cosine * np.float32(math.cos(phase) - 1)
        return np.ascontiguousarray(total.transpose(1, 2, 0), dtype=np.float32)


def cell_centers(rows: int, columns: int, aspect: float) -> tuple[FloatArray, FloatArray]:
    """Return x and y of the cells of a grid [h,w] over a picture of `aspect` = height / width."""
    x = (np.arange(columns, dtype=np.float32) + 0.5) / columns - 0.5
    y = ((np.arange(rows, dtype=np.float32) + 0.5) / rows - 0.5) * aspect
    along, down = np.meshgrid(x, y)
    return along.astype(np.float32), down.astype(np.float32)


def _sampled(values: FloatArray, points: FloatArray, aspect: float) -> FloatArray:
    """Sample a map [h,w,2] over the picture at `points`; beyond its borders it stays what it is there."""
    rows, columns = values.shape[:2]
    x = (points[..., 0] + 0.5) * columns - 0.5
    y = (points[..., 1] / aspect + 0.5) * rows - 0.5
    return np.asarray(_cubic(values, x, y), dtype=np.float32)


def _cubic(values: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    # OpenCV's remap counts in 32nds of a pixel, too coarse for a grid of few cells: the map is enlarged first.
    scale = 16
    padded = cv2.copyMakeBorder(values, 2, 2, 2, 2, cv2.BORDER_REPLICATE)
    large = cv2.resize(padded, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return np.asarray(
        cv2.remap(
            large,
            ((x + 2.5) * scale - 0.5).astype(np.float32),
            ((y + 2.5) * scale - 0.5).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )
