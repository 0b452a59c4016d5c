from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.metrics import (
    detail_retention,
    high_frequency_ratio,
    high_pass,
    mean_flow,
    psnr,
    still_ratio,
    warping_error,
)
from swifti2v.evaluation.motion import FramePair, consecutive_pairs

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


@pytest.mark.parametrize(("x", "y", "direction"), [(3, 0, 0), (0, 2, 90), (-3, 0, 180), (2, -2, -45)])
def test_mean_flow_of_a_known_translation(x: int, y: int, direction: float) -> None:
    # Content moves right when the window over the plane moves left.
    pair = FramePair(window(32, 32), window(32 - x, 32 - y))
    flow = mean_flow(pair)
    assert (flow.x, flow.y) == (pytest.approx(x, abs=0.2), pytest.approx(y, abs=0.2))
    assert flow.magnitude == pytest.approx(math.hypot(x, y), abs=0.3)
    assert abs((flow.direction - direction + 180) % 360 - 180) < 6


def test_still_ratio_tells_a_picture_from_a_film() -> None:
    still = [window(10, 10)] * 3
    moving = [window(10 + 2 * t, 10) for t in range(3)]
    assert still_ratio(consecutive_pairs(still)) == 1
    assert still_ratio(consecutive_pairs(moving)) < 0.05
    assert still_ratio(consecutive_pairs([*still[:2], window(12, 10)])) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(still_ratio(consecutive_pairs(still[:1])))


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
    assert kept.retention > 0.9
    assert kept.visible_share > 0.8
    assert soft.retention < 0.6
    assert noisy.retention < 0.8
    assert detail_retention(FramePair(image, image)).retention == pytest.approx(1, abs=1e-6)
