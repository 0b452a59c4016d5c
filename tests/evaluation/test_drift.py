"""Drift, flicker and cuts of courses and frames with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swifti2v.evaluation.drift import Look, deviation, drift, flicker, look, scene_cuts


def flat(*rgb: float) -> np.ndarray:
    return np.full((24, 32, 3), rgb, np.float32)


def test_look_of_a_flat_color() -> None:
    seen = look(flat(0.8, 0.5, 0.2))
    assert seen == pytest.approx(Look(0, 0, 0.6, 0.8, 0.5, 0.2, 0.299 * 0.8 + 0.587 * 0.5 + 0.114 * 0.2, 0), abs=1e-5)
    eight_bits = look(np.full((24, 32, 3), (204, 127.5, 51), np.float32).round().astype(np.uint8))
    assert eight_bits == pytest.approx(seen, abs=0.003)


def test_look_of_stripes() -> None:
    frame = np.zeros((32, 32, 3), np.float32)
    frame[:, ::2] = 1
    seen = look(frame)
    assert seen.contrast == pytest.approx(0.5)
    # All of this pattern is above the filter's pass band.
    assert seen.sharpness == pytest.approx(0.5, rel=0.02)
    assert seen.saturation == 0


def test_contrast_and_saturation_scale_with_the_picture() -> None:
    frame = np.random.default_rng(0).uniform(0.3, 0.7, (24, 32, 3)).astype(np.float32)
    gray = np.asarray(frame @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    plain, vivid = look(frame), look(gray + 1.05 * (frame - gray))
    assert vivid.saturation / plain.saturation == pytest.approx(1.05, abs=1e-4)
    assert vivid.contrast == pytest.approx(plain.contrast, rel=1e-4)
    assert look(0.5 + 1.1 * (frame - 0.5)).contrast / plain.contrast == pytest.approx(1.1, abs=1e-4)


@pytest.mark.parametrize("num_frames", [2, 20, 81])
def test_a_step_is_reported_whole(num_frames: int) -> None:
    half = num_frames // 2
    course = [0.4] * half + [0.42] * (num_frames - half)
    assert drift("saturation", course) == pytest.approx(5)
    assert drift("saturation", course[::-1]) == pytest.approx(100 * 0.02 / 0.42)
    assert drift("red", course) == pytest.approx(2)


def test_a_ramp_shows_the_distance_of_the_means_of_its_ends() -> None:
    course = list(np.linspace(0.4, 0.42, 101))
    # 15 frames at each end: their middles are 86 of the 100 steps apart.
    assert drift("green", course) == pytest.approx(0.86 * 2)


def test_deviation_is_signed_and_ends_at_the_drift() -> None:
    course = [0.5] * 20 + [0.45] * 20
    curve = deviation("contrast", course)
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(-10)
    assert len(curve) == 40
    assert drift("contrast", course) == pytest.approx(10)
    assert deviation("blue", []) == ()


def test_a_change_in_the_middle_is_no_drift() -> None:
    assert drift("red", [0.5] * 10 + [0.9] * 20 + [0.5] * 10) == pytest.approx(0, abs=1e-9)


def test_color_that_appears_in_a_gray_video_is_a_large_finite_drift() -> None:
    assert drift("saturation", [0.0] * 10 + [0.1] * 10) == pytest.approx(1000)


@pytest.mark.parametrize("course", [[], [0.5]])
def test_too_short_to_drift(course: list[float]) -> None:
    assert math.isnan(drift("red", course))


def test_flicker_sees_alternation_but_no_ramp() -> None:
    assert flicker([0.4 + 0.02 * (t % 2) for t in range(9)]) == pytest.approx([0.02 * 255] * 7)
    assert flicker(list(np.linspace(0.2, 0.8, 9))) == pytest.approx([0] * 7, abs=1e-9)
    assert flicker([0.5, 0.6]) == ()


def test_flicker_shows_where_a_flash_is() -> None:
    course = [0.5] * 9
    course[4] = 0.6
    # Curve t belongs to frame t + 1: half a flash before it, the whole, half after it.
    assert flicker(course) == pytest.approx([0, 0, 12.75, 25.5, 12.75, 0, 0])


def test_a_cut_is_found_where_it_is() -> None:
    assert scene_cuts([0.01, 0.02, 0.2, 0.02, 0.01], [0.9, 0.9, 0.1, 0.9, 0.9]) == (3,)
    assert scene_cuts([0.2], [0.1]) == (1,)
    assert scene_cuts([], []) == ()


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ([0.01, 0.2, 0.01], [0.9, 0.9, 0.9]),  # a flash: the picture is still there
        ([0.15, 0.2, 0.15], [0.1, 0.1, 0.1]),  # wild motion throughout
        ([0.001, 0.03, 0.001], [0.9, 0.1, 0.9]),  # too little to see
    ],
)
def test_no_cut(changes: list[float], shares: list[float]) -> None:
    assert scene_cuts(changes, shares) == ()
