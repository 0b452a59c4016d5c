"""Fields of motion, asked for and made: how much they move, where to, and whether they agree.

A field is the motion of the content between neighbouring frames, [F-1, H, W, 2] float32 in pixels, x to the right and y
down, given at the later frame's pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from swifti2v.data.procedural import Motion, MotionName, displacement
from swifti2v.evaluation.motion import consecutive_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]


class MotionSummary(NamedTuple):
    """What a field does on average over the picture and the clip.

    Args:
        magnitude: mean length of the vectors, in pixels per frame.
        x, y: mean motion of the content to the right and down, in pixels per frame.
        zoom: growth of the content, in percent per frame (half the divergence of the affine fit).
        rotation: clockwise, in degrees per frame (half the curl of the affine fit).
    """

    magnitude: float
    x: float
    y: float
    zoom: float
    rotation: float


def asked_field(name: MotionName, *, size: Size, num_frames: int, horizon: float) -> Array:
    """Return the field of a procedural motion at its default speed.

    `displacement` tells where a pixel was in frame 0, so that its change from one frame to the next is, but for terms
    of second order, the content's motion with the sign turned.
    """
    places = displacement([Motion(name)], size=size, num_frames=num_frames, horizon=horizon)
    return np.asarray(-np.diff(places, axis=0) * np.float32(size.width))


def made_field(frames: Iterable[Array]) -> Array:
    """Return the field of a video's own optical flow; frames as in `swifti2v.evaluation.motion`."""
    return np.stack([-pair.backward for pair in consecutive_pairs(frames)])


def summarise(field: Array) -> MotionSummary:
    """Return the means of a field; zoom and rotation by least squares over all pixels."""
    flow = field.mean(axis=0, dtype=np.float64)
    height, width = flow.shape[:2]
    columns = np.arange(width) - (width - 1) / 2
    rows = (np.arange(height) - (height - 1) / 2)[:, None]
    # The pixels' grid is centred, so that the slopes of a least-squares plane do not depend on each other.
    slope_x = (flow * columns[:, None]).sum(axis=(0, 1)) / (height * (columns**2).sum())
    slope_y = (flow * rows[..., None]).sum(axis=(0, 1)) / (width * (rows**2).sum())
    return MotionSummary(
        magnitude=float(np.linalg.norm(field, axis=-1).mean(dtype=np.float64)),
        x=float(flow[..., 0].mean()),
        y=float(flow[..., 1].mean()),
        zoom=float(100 * (slope_x[0] + slope_y[1]) / 2),
        rotation=float(math.degrees((slope_x[1] - slope_y[0]) / 2)),
    )


def agreement(made: Array, asked: Array) -> float:
    """Return the cosine between two fields of one shape, over all frames and pixels: -1 .. 1; NaN if one is still.

    1 means the same directions in the same places at the same times, whatever the speed.
    """
    product = float((made * asked).sum(dtype=np.float64))
    norms = math.sqrt(float((made**2).sum(dtype=np.float64)) * float((asked**2).sum(dtype=np.float64)))
    return product / norms if norms > 0 else math.nan
