"""SSIM against its written-out formula, MS-SSIM against its parts, both against what they must say of known damage."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.fidelity import SCALE_WEIGHTS, num_scales, similarity


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((height, width, 3)).astype(np.float32)
    coarse, fine = cv2.GaussianBlur(noise, (0, 0), 5), cv2.GaussianBlur(noise, (0, 0), 1.0)
    return (0.5 + 0.12 * coarse / coarse.std() + 0.05 * fine / fine.std()).clip(0, 1)


def worse(frame: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(9).standard_normal(frame.shape).astype(np.float32)
    return (cv2.GaussianBlur(frame, (0, 0), 1.0) * 0.95 + 0.02 * noise).clip(0, 1)


def gray(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def written_out(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM, and its contrast-structure part alone, window by window, from the definition of 2004."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    whole, part = [], []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            variances = (weights * (p - mean_p) ** 2).sum() + (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            contrast = (2 * covariance + 0.03**2) / (variances + 0.03**2)
            part.append(contrast)
            whole.append(contrast * (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2))
    return float(np.mean(whole)), float(np.mean(part))


def halved(values: np.ndarray) -> np.ndarray:
    height, width = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
    return values[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def test_ssim_is_its_formula() -> None:
    frame = picture(30, 41)
    damaged = worse(frame)
    assert similarity(damaged, frame).ssim == pytest.approx(written_out(gray(damaged), gray(frame))[0], abs=2e-5)


def test_ms_ssim_is_the_weighted_product_over_scales() -> None:
    frame = picture(47, 60)  # odd: a row is left out on the way down
    damaged = worse(frame)
    a, b = gray(damaged), gray(frame)
    first, second = written_out(a, b), written_out(halved(a), halved(b))
    assert num_scales(47, 60) == 3
    third = written_out(halved(halved(a)), halved(halved(b)))
    weights = np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001)
    expected = float(np.prod(np.array([first[1], second[1], third[0]]) ** weights))
    assert similarity(damaged, frame).ms_ssim == pytest.approx(expected, abs=2e-5)


def test_weights_are_those_of_2003() -> None:
    assert sum(SCALE_WEIGHTS) == pytest.approx(1, abs=2e-4)
    assert max(SCALE_WEIGHTS) == SCALE_WEIGHTS[2]


@pytest.mark.parametrize(
    ("side", "expected"), [(11, 1), (21, 1), (22, 2), (87, 3), (88, 4), (175, 4), (176, 5), (1408, 5)]
)
def test_scales_are_as_many_as_hold_a_window(side: int, expected: int) -> None:
    assert num_scales(side, 3 * side) == num_scales(3 * side, side) == expected
    assert side // 2 ** (expected - 1) >= 11


def test_equal_frames_and_eight_bits() -> None:
    frame = (picture(64, 96) * 255).round().astype(np.uint8)
    assert similarity(frame, frame) == pytest.approx((1, 1), abs=1e-5)
    assert max(similarity(frame, frame)) <= 1
    assert similarity(frame, frame.astype(np.float32) / 255) == pytest.approx((1, 1), abs=1e-5)


def test_more_damage_is_less_alike() -> None:
    frame = picture(180, 200)
    blurs = [similarity(cv2.GaussianBlur(frame, (0, 0), sigma), frame) for sigma in (0.7, 1.5, 3.0)]
    assert [each.ssim for each in blurs] == sorted((each.ssim for each in blurs), reverse=True)
    assert [each.ms_ssim for each in blurs] == sorted((each.ms_ssim for each in blurs), reverse=True)
    # A small blur is gone at coarser scales.
    assert blurs[1].ms_ssim > blurs[1].ssim + 0.1


def test_an_inverted_picture_is_not_alike() -> None:
    frame = picture(64, 64)
    result = similarity(1 - frame, frame)
    assert result.ssim < -0.3
    assert result.ms_ssim == 0


@pytest.mark.parametrize(("other", "words"), [((64, 65, 3), "one size"), ((8, 64, 3), "at least 11x11")])
def test_refusals(other: tuple[int, int, int], words: str) -> None:
    with pytest.raises(VideoInputError, match=words):
        similarity(np.zeros((64, 64, 3) if words == "one size" else other, np.uint8), np.zeros(other, np.uint8))
