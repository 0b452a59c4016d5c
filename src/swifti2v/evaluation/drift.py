"""Slow and sudden change of the look of a video: drift from its start to its end, flicker, scene cuts.

All of it is made of a few numbers per frame, so that a video of any length needs little memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.evaluation.metrics import high_frequency_energy
from swifti2v.evaluation.motion import luma, unit_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]

END_SHARE = 0.15
"""Share of the frames that count as the start, and as the end."""

# A start below this counts as this much: a gray video that gains color shows a large drift, not a division by zero.
SMALLEST_START = {"sharpness": 0.001, "contrast": 0.01, "saturation": 0.01}

# A cut: the picture changes by so much (mean of all channels, in [0, 1]), by so many times its change thereabouts, and
# motion explains less than half of the new picture.
CUT_CHANGE, CUT_RATIO, CUT_VISIBLE = 0.05, 3.0, 0.5
CUT_NEIGHBORS = 2


class Look(NamedTuple):
    """What a frame looks like as a whole; RGB values in [0, 1].

    Args:
        sharpness: root mean square of the fine detail (`metrics.high_pass`).
        contrast: standard deviation of luma.
        saturation: mean of the largest less the smallest channel of each pixel.
        red, green, blue: means of the channels.
        brightness: mean of luma.
        laplacian: variance of the Laplacian of luma, in squared levels of 255: sharpness, for pulses and drops.
    """

    sharpness: float
    contrast: float
    saturation: float
    red: float
    green: float
    blue: float
    brightness: float
    laplacian: float


def look(frame: Array) -> Look:
    """Return the look of a frame, RGB [H, W, 3], uint8 or float in [0, 1]."""
    rgb = unit_rgb(frame)
    gray = luma(rgb)
    red, green, blue = (rgb[..., channel] for channel in range(3))
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return Look(
        math.sqrt(high_frequency_energy(rgb)),
        float(gray.std(dtype=np.float64)),
        float(chroma.mean(dtype=np.float64)),
        float(red.mean(dtype=np.float64)),
        float(green.mean(dtype=np.float64)),
        float(blue.mean(dtype=np.float64)),
        float(gray.mean(dtype=np.float64)),
        float(np.asarray(cv2.Laplacian(gray * np.float32(255), cv2.CV_32F)).var(dtype=np.float64)),
    )


def deviation(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return how far each frame's value is from the mean of the first 15% of frames, in percent, signed.

    Sharpness, contrast and saturation: percent of that mean. Channels: percentage points of the full range.

    Args:
        name: a field of `Look`.
        values: that field of each frame; the result is as long.
    """
    if not values:
        return ()
    start = _mean(values[: _end_frames(len(values))])
    scale = max(start, SMALLEST_START[name]) if name in SMALLEST_START else 1.0
    return tuple(100 * (value - start) / scale for value in values)


def drift(name: str, values: Sequence[float]) -> float:
    """Return ``|M(first 15%) - M(last 15%)|`` in the percent of `deviation`; >= 0, lower is steadier.

    A linear ramp over the whole video shows 85% of itself. NaN for fewer than two frames. Source: Zhang and Agrawala,
    "Packing Input Frame Context in Next-Frame Prediction Models" (FramePack), arXiv 2504.12626, start-end contrast.
    """
    if len(values) < 2:
        return math.nan
    return abs(_mean(deviation(name, values)[-_end_frames(len(values)) :]))


def flicker(brightness: Sequence[float]) -> tuple[float, ...]:
    """Return ``|y_t - (y_(t-1) + y_(t+1)) / 2|`` of the frames that have two neighbors, in levels of 255.

    y is `Look.brightness`. Steady motion and slow ramps give about 0; brightness that alternates between two levels
    gives their difference. Empty for fewer than three frames.
    """
    values = np.asarray(brightness, np.float64) * 255
    return tuple(float(value) for value in np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2))


def scene_cuts(changes: Sequence[float], visible_shares: Sequence[float]) -> tuple[int, ...]:
    """Return the frames that begin a new scene.

    A frame does if it differs from the one before by at least 0.05 (mean absolute difference in [0, 1]), by at least
    three times the mean difference of the four frames around it, and if motion explains less than half of it.

    Args:
        changes: mean absolute difference from frame t-1 to t, t = 1, 2, ...
        visible_shares: share of frame t that frame t-1 shows too (`FramePair.visible`).
    """
    cuts = []
    for place, (change, share) in enumerate(zip(changes, visible_shares, strict=True)):
        around = [*changes[max(0, place - CUT_NEIGHBORS) : place], *changes[place + 1 : place + 1 + CUT_NEIGHBORS]]
        usual = _mean(around) if around else 0.0
        if change >= CUT_CHANGE and change >= CUT_RATIO * usual and share < CUT_VISIBLE:
            cuts.append(place + 1)
    return tuple(cuts)


def _end_frames(num_frames: int) -> int:
    return max(1, round(END_SHARE * num_frames))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
