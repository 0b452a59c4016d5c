"""Measures of frames on known errors; SSIM against its written-out formula, MS-SSIM against its parts."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.metrics import (
    SCALE_WEIGHTS,
    detail_retention,
    flow_magnitude,
    high_frequency_ratio,
    high_pass,
    num_scales,
    psnr,
    similarity,
    still_share,
    warping_error,
)
from swifti2v.evaluation.motion import FramePair

HEIGHT, WIDTH = 96, 128


def plane(height: int = HEIGHT + 64, width: int = WIDTH + 64) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((height, width, 3)).astype(np.float32)
    coarse, fine = cv2.GaussianBlur(noise, (0, 0), 6), cv2.GaussianBlur(noise, (0, 0), 1.0)
    return (0.5 + 0.1 * coarse / coarse.std() + 0.05 * fine / fine.std()).clip(0, 1)


def window(x: int, y: int) -> np.ndarray:
    return plane()[y : y + HEIGHT, x : x + WIDTH]


def test_psnr_of_a_known_error_and_of_equal_frames() -> None:
    truth = window(0, 0) * 0.5
    assert psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-3)
    assert psnr(truth, truth) == 100
    mask = np.zeros((HEIGHT, WIDTH), bool)
    assert math.isnan(psnr(truth, truth, mask=mask))
    mask[:10] = True
    half_wrong = truth.copy()
    half_wrong[10:] += 0.3
    half_wrong[:10] += 0.01
    assert psnr(half_wrong, truth, mask=mask) == pytest.approx(40, abs=1e-2)


def test_psnr_reads_eight_bits_as_the_same_frame() -> None:
    frame = (window(0, 0) * 255).round().astype(np.uint8)
    assert psnr(frame, frame.astype(np.float32) / 255) == 100


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 3), np.int64)])
def test_frames_of_another_kind_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(VideoInputError):
        psnr(wrong, wrong)


def test_frames_of_two_sizes_are_refused() -> None:
    with pytest.raises(VideoInputError, match="one size"):
        psnr(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(VideoInputError, match="one size"):
        FramePair(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))


def test_high_pass_of_a_sine_is_its_amplitude_times_the_filters_response() -> None:
    period, sigma = 8.0, 2.0
    wave = 0.5 + 0.2 * np.sin(2 * np.pi * np.arange(WIDTH, dtype=np.float32) / period)
    frame = np.broadcast_to(wave[None, :, None], (HEIGHT, WIDTH, 3)).astype(np.float32)
    response = 1 - math.exp(-2 * (math.pi * sigma / period) ** 2)
    inner = high_pass(frame, sigma=sigma)[:, 32:-32]
    assert inner.max() == pytest.approx(0.2 * response, rel=0.02)


def test_high_frequency_ratio_is_a_ratio_of_squares() -> None:
    frame = window(0, 0)
    assert high_frequency_ratio(0.5 + 0.5 * (frame - 0.5), frame) == pytest.approx(0.25, rel=1e-3)
    assert high_frequency_ratio(cv2.GaussianBlur(frame, (0, 0), 3), frame) < 0.1
    assert math.isnan(high_frequency_ratio(frame, np.full_like(frame, 0.5)))


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, 2), (-3, 0), (2, -2)])
def test_flow_of_a_known_translation(x: int, y: int) -> None:
    # Content moves right when the window over the plane moves left.
    pair = FramePair(window(32, 32), window(32 - x, 32 - y))
    assert pair.forward.mean(axis=(0, 1)) == pytest.approx([x, y], abs=0.2)
    assert flow_magnitude(pair) == pytest.approx(math.hypot(x, y), abs=0.3)


def test_still_share_tells_a_picture_from_a_film() -> None:
    assert still_share(FramePair(window(10, 10), window(10, 10))) == 1
    assert still_share(FramePair(window(10, 10), window(12, 10))) < 0.05


def test_warping_error_forgives_motion_but_not_flicker() -> None:
    moved = FramePair(window(20, 20), window(23, 21))
    flickers = FramePair(window(20, 20), window(23, 21) + 0.05)
    assert warping_error(FramePair(window(0, 0), window(0, 0))) == pytest.approx(0, abs=1e-6)
    assert warping_error(moved) < 0.05 * float(((moved.earlier - moved.later) ** 2).sum(axis=-1).mean())
    # Squares summed over three channels.
    assert warping_error(flickers) - warping_error(moved) == pytest.approx(3 * 0.05**2, rel=0.1)


def test_what_is_newly_shown_is_not_visible() -> None:
    pair = FramePair(window(0, 16), window(16, 16))
    assert not pair.visible[:, -12:].any()
    assert pair.visible[16:-16, 16:-24].mean() > 0.95


def test_detail_retention_tells_kept_from_lost_from_noisy() -> None:
    image, later = window(20, 20), window(23, 21)
    kept = detail_retention(FramePair(image, later))
    soft = detail_retention(FramePair(image, cv2.GaussianBlur(later, (0, 0), 1.5)))
    noise = 0.1 * np.random.default_rng(2).standard_normal(later.shape).astype(np.float32)
    noisy = detail_retention(FramePair(image, (later + noise).clip(0, 1)))
    assert kept > 0.9
    assert soft < 0.6
    assert noisy < 0.8
    assert detail_retention(FramePair(image, image)) == pytest.approx(1, abs=1e-6)


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


@pytest.mark.parametrize(("shape", "other"), [((64, 64, 3), (64, 65, 3)), ((8, 64, 3), (8, 64, 3))])
def test_frames_that_have_no_ssim(shape: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    with pytest.raises(VideoInputError):
        similarity(np.zeros(shape, np.uint8), np.zeros(other, np.uint8))
