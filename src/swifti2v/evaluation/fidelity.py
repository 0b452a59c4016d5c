"""Likeness of a frame to its truth: SSIM and MS-SSIM of luma. Frames are RGB [H, W, 3], uint8 or float in [0, 1]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.motion import luma

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]

WINDOW, SIGMA = 11, 1.5
LUMINANCE_FLOOR, CONTRAST_FLOOR = 0.01**2, 0.03**2  # K1 and K2, with values in [0, 1]
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang et al. 2003)."""


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
    if frame.shape != truth.shape:
        msg = f"frames of sizes {frame.shape[:2]} and {truth.shape[:2]} cannot be compared; use one size"
        raise VideoInputError(msg)
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
