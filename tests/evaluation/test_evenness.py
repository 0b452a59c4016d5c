"""Evenness on pans with planted defects of known size, on frames in memory; a still video gets no number."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.evaluation.drift import look
from swifti2v.evaluation.evenness import (
    EVENNESS,
    JOLT,
    Uncovered,
    block_steps,
    deviation_from_line,
    evenness,
    in_words,
    judder,
    pulse,
    split_error,
    split_psnr,
)
from swifti2v.evaluation.motion import luma, optical_flow
from swifti2v.evaluation.registry import metrics_of
from swifti2v.evaluation.results import VideoResult
from swifti2v.evaluation.tables import table_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEIGHT, WIDTH, FRAMES = 72, 128, 41
SEGMENT_SIZE = 3


def picture() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(30, 220, (16, 64, 3), dtype=np.uint8)
    return cv2.resize(coarse, (640, 160), interpolation=cv2.INTER_CUBIC)


def shown(transform: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(picture(), np.float32(transform), (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)


def pan(places: Sequence[float]) -> list[np.ndarray]:
    return [shown([[1, 0, -20 - place], [0, 1, -20]]) for place in places]


def pan_by(step: Callable[[int], float]) -> list[np.ndarray]:
    """A pan whose step from frame t-1 to t is ``step(t)`` pixels."""
    return pan(np.cumsum([0.0, *(step(t) for t in range(1, FRAMES))]))


def values_of(frames: Sequence[np.ndarray]) -> dict[str, float]:
    steps = [block_steps(optical_flow(luma(a), luma(b))) for a, b in pairwise(frames)]
    return evenness(steps, [look(frame) for frame in frames], segment_size=SEGMENT_SIZE)


def words_of(values: dict[str, float]) -> str:
    return "; ".join(in_words(values, segment_size=SEGMENT_SIZE))


@pytest.fixture(scope="module")
def even() -> list[np.ndarray]:
    return pan_by(lambda _t: 2)


@pytest.fixture(scope="module")
def even_values(even: list[np.ndarray]) -> dict[str, float]:
    return values_of(even)


def test_an_even_pan_has_no_defect(even_values: dict[str, float]) -> None:
    assert even_values["judder"] < 0.02
    assert even_values["first_step"] == pytest.approx(1, abs=0.05)
    assert even_values["sharpness_kept"] == pytest.approx(1, abs=0.1)
    for name in ("backward_steps", "motion_pulse", "motion_pulse_borders"):
        assert even_values[name] < 0.02
    assert max(even_values["brightness_pulse"], even_values["brightness_pulse_borders"]) < 0.2
    assert even_values["first_color_offset"] < 0.5
    assert words_of(even_values).startswith("moves evenly")
    assert ";" not in words_of(even_values)


@pytest.mark.parametrize("kind", ["zoom", "rotate"])
def test_motion_whose_mean_is_nothing_counts_as_motion(kind: str) -> None:
    frames = []
    for t in range(FRAMES):
        angle, scale = (0.0, 1 + 0.01 * t) if kind == "zoom" else (0.6 * t, 1.0)
        moved = cv2.getRotationMatrix2D((320, 80), angle, scale) - [[0, 0, 320 - WIDTH / 2], [0, 0, 80 - HEIGHT / 2]]
        frames.append(shown(moved))
    values = values_of(frames)
    assert values["judder"] < 0.15
    assert values["motion_pulse"] < 0.1


def test_steps_beside_their_definition() -> None:
    """Independent of flows: jolts of 4 among steps of 1 have a judder of sqrt(8 / 7)."""
    jolts = np.asarray([[4.0 if t % 4 == 0 else 1.0] for t in range(401)])
    changes, squares = 2 * 9 / 4, (16 + 3) / 4
    assert judder(jolts) == pytest.approx(math.sqrt(changes / squares), rel=0.01)
    # C(4) is the variance, 27/16; C(3) and C(5) are a third of it, below zero.
    assert pulse(jolts) == pytest.approx(math.sqrt(27 / 16 * 4 / 3), rel=0.02)
    assert judder(np.random.default_rng(0).standard_normal((2000, 2))) == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("period", [2.0, 17.0, 40.0])
def test_other_periods_are_no_pulse(period: float) -> None:
    wave = np.sin(2 * np.pi * np.arange(80) / period)[:, None]
    assert pulse(wave) < 0.25 * wave.std() or period == 2.0  # what alternates repeats every 4 frames too
    assert math.isnan(pulse(wave[:7]))


def test_a_jolt_every_four_frames() -> None:
    values = values_of(pan_by(lambda t: 4 if t % 4 == 1 else 1))
    assert values["judder"] == pytest.approx(math.sqrt(18 / 19), abs=0.1)
    assert values["first_step"] == pytest.approx(4, abs=0.3)
    assert values["motion_pulse"] > 0.5
    assert values["motion_pulse_borders"] < JOLT
    for words in ("lurches", "a jolt every 4 frames", "its first step is 4.0 times"):
        assert words in words_of(values)


def test_a_jolt_at_the_borders_of_segments_is_told_from_one_at_latent_frames() -> None:
    values = values_of(pan_by(lambda t: 5 if t > 1 and t % 12 == 1 else 1))
    assert values["motion_pulse_borders"] > JOLT > values["motion_pulse"]
    assert "a jolt every 12 frames, at the borders of segments" in words_of(values)


def test_steps_backward() -> None:
    values = values_of(pan_by(lambda t: -1.5 if t % 10 == 0 else 2))
    assert values["backward_steps"] == pytest.approx(100 * 4 / (FRAMES - 1), abs=0.1)
    swaying = values_of(pan([10 * math.sin(2 * math.pi * t / 20) for t in range(FRAMES)]))
    assert math.isnan(swaying["backward_steps"]), "motion to and fro"
    assert swaying["judder"] == pytest.approx(2 * math.sin(math.pi / 20), abs=0.05)


def test_sharpness_that_halves_at_frame_one(even: list[np.ndarray], even_values: dict[str, float]) -> None:
    soft = [even[0], *(cv2.GaussianBlur(frame, (0, 0), 1.6) for frame in even[1:])]
    values = values_of(soft)
    assert values["sharpness_kept"] < 0.6 * even_values["sharpness_kept"]
    assert values["judder"] < 0.05
    assert "its sharpness falls from frame 0 to frame 1" in words_of(values)


def test_sharpness_that_pulses(even: list[np.ndarray]) -> None:
    values = values_of([cv2.GaussianBlur(frame, (0, 0), 1.2 if t % 4 == 0 else 0.6) for t, frame in enumerate(even)])
    assert values["sharpness_pulse"] > 5
    assert "its sharpness pulses every 4 frames" in words_of(values)


@pytest.mark.parametrize(("period", "name"), [(4, "brightness_pulse"), (12, "brightness_pulse_borders")])
def test_brightness_that_pulses(even: list[np.ndarray], period: int, name: str) -> None:
    values = values_of([cv2.add(frame, (6, 6, 6, 0)) if t % period == 1 else frame for t, frame in enumerate(even)])
    other = "brightness_pulse" if period == 12 else "brightness_pulse_borders"
    assert values[name] > 1 > values[other]
    assert values["judder"] < 0.1
    assert f"its brightness pulses every {period} frames" in words_of(values)
    assert values["brightness_deviation"] > 1


def test_a_steady_rise_of_brightness_is_no_deviation() -> None:
    assert deviation_from_line(np.arange(20.0)) == pytest.approx(0, abs=1e-9)
    assert deviation_from_line(np.tile([0.0, 2.0], 50)) == pytest.approx(1, abs=0.01)


def test_a_first_frame_of_another_color(even: list[np.ndarray]) -> None:
    values = values_of([cv2.add(even[0], (0, 0, 8, 0)), *even[1:]])
    assert values["first_color_offset"] == pytest.approx(8, abs=0.7)
    assert "the color of frame 0 is off" in words_of(values)


def test_a_still_video_gets_no_number_and_cannot_win(even: list[np.ndarray], even_values: dict[str, float]) -> None:
    noise = np.random.default_rng(1)
    still = [cv2.add(even[0], noise.integers(0, 2, even[0].shape, dtype=np.uint8)) for _ in range(FRAMES)]
    values = values_of(still)
    assert all(math.isnan(values[name]) for name in EVENNESS)
    assert words_of(values).startswith("the picture as a whole does not move")
    videos = [
        VideoResult(label, f"{label}.mp4", WIDTH, HEIGHT, FRAMES, 8.0, found)
        for label, found in (("still", values), ("even", even_values), ("jolts", even_values | {"judder": 0.9}))
    ]
    for metric in metrics_of(EVENNESS):
        assert not table_row(metric, videos)[0].best, metric.name
    assert [cell.best for cell in table_row(*metrics_of(["judder"]), videos)] == [False, True, False]


def test_one_frame_and_two_frames(even: list[np.ndarray]) -> None:
    assert all(math.isnan(value) for value in values_of(even[:1]).values())
    two = values_of(even[:2])
    assert math.isnan(two["judder"])
    assert two["first_step"] == 1


def test_newly_uncovered_content_is_told_from_what_persists(even: list[np.ndarray]) -> None:
    """A pan of 2 pixels a frame uncovers a strip at the right edge: 2 t pixels wide at frame t."""
    uncovered = Uncovered()
    errors = []
    for t, frame in enumerate(even[:17]):
        where = uncovered(frame)
        assert where[:, : WIDTH - 2 * t - 6].mean() < 0.02
        assert where[4:-4, WIDTH - 2 * t + 6 :].all()
        damaged = frame.copy()
        damaged[where] = np.clip(damaged[where].astype(int) + 20, 0, 255)
        damaged[~where] = np.clip(damaged[~where].astype(int) + 2, 0, 255)
        errors.append(split_error(damaged, frame, where))
    new, old = split_psnr(errors)
    assert new == pytest.approx(20 * math.log10(255 / 20), abs=0.3)
    assert old == pytest.approx(20 * math.log10(255 / 2), abs=0.3)
    nothing = split_error(even[0], even[0], np.zeros((HEIGHT, WIDTH), bool))
    assert math.isnan(split_psnr([nothing])[0])
    assert split_psnr([nothing])[1] == 100
