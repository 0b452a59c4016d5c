"""Measures of a frame beside its truth, and of two neighbors. Frames are RGB [H, W, 3], uint8 or float in [0, 1]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.motion import FramePair, check_same_size, luma, unit_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]

HIGH_PASS_SIGMA = 2.0
STILL_BELOW = 0.1
# Equal frames would give infinity, which spoils every mean; eight-bit video cannot show a difference beyond this.
HIGHEST_PSNR = 100.0
WINDOW, SIGMA = 11, 1.5
LUMINANCE_FLOOR, CONTRAST_FLOOR = 0.01**2, 0.03**2  # K1 and K2, with values in [0, 1]
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang et al. 2003)."""


def psnr(frame: Array, truth: Array, *, mask: Array | None = None) -> float:
    """Return ``-10 log10 mean((frame - truth)^2)`` over pixels and channels in [0, 1], in dB.

    0 .. 100 (equal frames are given 100); higher is better. With `mask`, [H, W] bool or weights >= 0, over the pixels
    that it names; NaN if it names none.

    Raises:
        VideoInputError: the frames differ in size.
    """
    check_same_size(frame, truth)
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
    `flow_magnitude`. NaN if no pixel is visible. Source: Lai et al., "Learning Blind Video Temporal Consistency", ECCV
    2018, E_warp of neighboring frames; with DIS instead of FlowNet2, so numbers compare with each other, not with that
    paper's.
    """
    squared = ((pair.later - pair.predicted) ** 2).sum(axis=-1, dtype=np.float64)
    return float(squared[pair.visible].mean()) if pair.visible.any() else math.nan


def flow_magnitude(pair: FramePair) -> float:
    """Return the mean length of the motion of the earlier frame's content, in pixels per frame, over all pixels."""
    return float(np.hypot(pair.forward[..., 0], pair.forward[..., 1]).mean(dtype=np.float64))


def still_share(pair: FramePair, *, below: float = STILL_BELOW) -> float:
    """Return the share of pixels that move by less than `below` pixels per frame; 0 .. 1, 1 for a still picture."""
    return float((np.hypot(pair.forward[..., 0], pair.forward[..., 1]) < below).mean())


def detail_retention(pair: FramePair, *, sigma: float = HIGH_PASS_SIGMA) -> float:
    """Return how much of the image's detail a frame shows where it belongs; call with `FramePair(image, frame)`.

    With a the high-pass of the image moved to the frame by the flow and b the frame's, both on the visible pixels:
    ``<a, b> / max(<a, a>, <b, b>)``. -1 .. 1, best 1; 0 if the detail is gone or elsewhere; below 1 too if there is
    more than the image had (noise). NaN if no visible pixel has detail.
    """
    moved, shown = high_pass(pair.predicted, sigma=sigma), high_pass(pair.later, sigma=sigma)
    a, b = moved[pair.visible].astype(np.float64), shown[pair.visible].astype(np.float64)
    energy = max(float(a @ a), float(b @ b))
    return float(a @ b) / energy if energy > 0 else math.nan


class Similarity(NamedTuple):
    """Structural similarity of two frames, each at most 1 (equal frames), higher is better.

    Args:
        ssim: at the frames' own size; -1 .. 1.
        ms_ssim: over up to five scales, each half of the one before; 0 .. 1.
    """

    ssim: float
    ms_ssim: float


class _Scale(NamedTuple):
    """Means over a scale: of luminance, contrast and structure, and of the latter two alone."""

    full: float
    contrast: float


def similarity(frame: Array, truth: Array) -> Similarity:
    """Return SSIM and MS-SSIM of the luma (BT.601) of two frames.

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, population variances, whole windows only. A frame
    too small for five scales is judged on as many as hold a window, their weights scaled to the same sum. Source:
    Wang et al., "Image Quality Assessment", IEEE TIP 2004; Wang et al., "Multiscale Structural Similarity", Asilomar
    2003.

    Raises:
        VideoInputError: the frames differ in size, or are smaller than the window.
    """
    check_same_size(frame, truth)
    if min(frame.shape[:2]) < WINDOW:
        msg = f"frames of {frame.shape[1]}x{frame.shape[0]} are too small for SSIM; use at least {WINDOW}x{WINDOW}"
        raise VideoInputError(msg)
    a, b = luma(frame), luma(truth)
    scales = [_scale(a, b)]
    for _ in range(1, num_scales(*frame.shape[:2])):
        a, b = _halved(a), _halved(b)
        scales.append(_scale(a, b))
    # Rounding takes equal frames a billionth beyond 1.
    return Similarity(min(1.0, scales[0].full), min(1.0, _combined(scales)))


def num_scales(height: int, width: int) -> int:
    """Return on how many scales MS-SSIM judges frames of this size: five from 176 pixels on the short side."""
    return max(1, min(len(SCALE_WEIGHTS), int(math.log2(min(height, width) / WINDOW)) + 1))


def _combined(scales: Sequence[_Scale]) -> float:
    """Product of the contrasts and of the coarsest whole term; a negative one counts as 0: it has no real power."""
    weights = np.asarray(SCALE_WEIGHTS[: len(scales)])
    terms = np.asarray([*(scale.contrast for scale in scales[:-1]), scales[-1].full])
    return float(np.prod(terms.clip(min=0) ** (weights / weights.sum())))


def _scale(a: Array, b: Array) -> _Scale:
    mean_a, mean_b = _windowed(a), _windowed(b)
    variances = _windowed(a * a) - mean_a**2 + _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    contrast = (2 * covariance + CONTRAST_FLOOR) / (variances + CONTRAST_FLOOR)
    luminance = (2 * mean_a * mean_b + LUMINANCE_FLOOR) / (mean_a**2 + mean_b**2 + LUMINANCE_FLOOR)
    return _Scale(float((luminance * contrast).mean(dtype=np.float64)), float(contrast.mean(dtype=np.float64)))


def _windowed(values: Array) -> Array:
    """Gaussian means of whole windows only, [H - 10, W - 10]."""
    margin = WINDOW // 2
    blurred = np.asarray(cv2.GaussianBlur(values, (WINDOW, WINDOW), SIGMA))
    return blurred[margin:-margin, margin:-margin]


def _halved(values: Array) -> Array:
    """Means of 2x2 pixels; an odd last row or column is left out."""
    height, width = values.shape[0] // 2, values.shape[1] // 2
    size = (width, height)
    return np.asarray(cv2.resize(values[: 2 * height, : 2 * width], size, interpolation=cv2.INTER_AREA))
