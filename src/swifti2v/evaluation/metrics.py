"""Measures of frames and of pairs of frames: pure functions. Frames are RGB [H, W, 3], uint8 or float32 in [0, 1]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.motion import FramePair, luma, unit_rgb

if TYPE_CHECKING:
    from collections.abc import Iterable

Array = np.ndarray[Any, Any]

HIGH_PASS_SIGMA = 2.0
STILL_BELOW = 0.1
# Equal frames would give infinity, which spoils every mean; eight-bit video cannot show a difference beyond this.
HIGHEST_PSNR = 100.0


class MeanFlow(NamedTuple):
    """Motion of the content from one frame to the next, in pixels per frame.

    Args:
        x: mean to the right.
        y: mean downwards.
        magnitude: mean length of the vectors, >= 0.
    """

    x: float
    y: float
    magnitude: float

    @property
    def direction(self) -> float:
        """Angle of the mean vector in degrees, counted from right over down, in (-180, 180]."""
        return math.degrees(math.atan2(self.y, self.x))


class DetailRetention(NamedTuple):
    """How much of the image's fine detail a later frame still shows, and the share of its pixels that was judged."""

    retention: float
    visible_share: float


def psnr(frame: Array, truth: Array, *, mask: Array | None = None) -> float:
    """Return ``-10 log10 mean((frame - truth)^2)`` over pixels and channels in [0, 1], in dB.

    0 .. 100 (equal frames are given 100); higher is better. With `mask`, [H, W] bool or weights >= 0, over the pixels
    that it names; NaN if it names none.

    Raises:
        VideoInputError: the frames differ in size.
    """
    if frame.shape != truth.shape:
        msg = f"frames of sizes {frame.shape[:2]} and {truth.shape[:2]} cannot be compared; use one size"
        raise VideoInputError(msg)
    squared = ((unit_rgb(frame) - unit_rgb(truth)) ** 2).mean(axis=-1, dtype=np.float64)
    weights = np.ones_like(squared) if mask is None else mask.astype(np.float64)
    total = float(weights.sum())
    if total == 0:
        return math.nan
    error = float((squared * weights).sum()) / total
    return min(HIGHEST_PSNR, -10 * math.log10(error)) if error > 0 else HIGHEST_PSNR


def high_pass(frame: Array, *, sigma: float = HIGH_PASS_SIGMA) -> Array:
    """Return the fine detail of a frame, [H, W] float32: luma less luma blurred by a Gaussian of `sigma` pixels."""
    gray = luma(frame)
    return np.asarray(gray - np.asarray(cv2.GaussianBlur(gray, (0, 0), sigma)))


def high_frequency_energy(frame: Array, *, sigma: float = HIGH_PASS_SIGMA) -> float:
    """Return the mean square of `high_pass` of a frame; >= 0, 0 for a flat frame."""
    return float((high_pass(frame, sigma=sigma).astype(np.float64) ** 2).mean())


def high_frequency_ratio(frame: Array, truth: Array, *, sigma: float = HIGH_PASS_SIGMA) -> float:
    """Return `high_frequency_energy` of a frame over that of its truth.

    >= 0, best 1; below 1 is soft, above 1 is noisy. Energy (a square), not amplitude: 0.81 means that amplitudes are
    at 0.9. NaN if the truth is flat.
    """
    reference = high_frequency_energy(truth, sigma=sigma)
    return high_frequency_energy(frame, sigma=sigma) / reference if reference > 0 else math.nan


def warping_error(pair: FramePair) -> float:
    """Return the mean over visible pixels of ``|later - warp(earlier)|^2``, squares summed over the three channels.

    >= 0, lower is steadier; multiply by 1e3 to read it as papers do. A still video scores 0, so read it beside
    `mean_flow`. NaN if no pixel is visible. Source: Lai et al., "Learning Blind Video Temporal Consistency", ECCV 2018,
    E_warp of neighboring frames; with DIS instead of FlowNet2, so numbers compare with each other, not with that
    paper's.
    """
    squared = ((pair.later - pair.predicted) ** 2).sum(axis=-1, dtype=np.float64)
    return float(squared[pair.visible].mean()) if pair.visible.any() else math.nan


def mean_flow(pair: FramePair) -> MeanFlow:
    """Return the mean motion of the earlier frame's content, in pixels per frame, over all pixels."""
    x, y = (float(value) for value in pair.forward.mean(axis=(0, 1), dtype=np.float64))
    return MeanFlow(x, y, float(np.hypot(pair.forward[..., 0], pair.forward[..., 1]).mean(dtype=np.float64)))


def still_ratio(pairs: Iterable[FramePair], *, below: float = STILL_BELOW) -> float:
    """Return the share of pixels, over all pairs, that move by less than `below` pixels per frame.

    0 .. 1; 1 is a still picture. NaN without pairs.
    """
    shares = [float((np.hypot(pair.forward[..., 0], pair.forward[..., 1]) < below).mean()) for pair in pairs]
    return math.fsum(shares) / len(shares) if shares else math.nan


def detail_retention(pair: FramePair, *, sigma: float = HIGH_PASS_SIGMA) -> DetailRetention:
    """Return how much of the image's detail a frame shows where it belongs; call with `FramePair(image, frame)`.

    With a the high-pass of the image moved to the frame by the flow and b the frame's, both on the visible pixels:
    ``<a, b> / max(<a, a>, <b, b>)``. -1 .. 1, best 1; 0 if the detail is gone or elsewhere; below 1 too if there is
    more than the image had (noise). `retention` is NaN if no visible pixel has detail.
    """
    moved, shown = high_pass(pair.predicted, sigma=sigma), high_pass(pair.later, sigma=sigma)
    seen = pair.visible
    a, b = moved[seen].astype(np.float64), shown[seen].astype(np.float64)
    energy = max(float(a @ a), float(b @ b))
    return DetailRetention(float(a @ b) / energy if energy > 0 else math.nan, float(seen.mean()))
