"""The flow comparison on clips whose motion is known, its tables, and the measures of a full video."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from benchmarks.motion import (
    EVENNESS,
    MotionSummary,
    PromptResult,
    agreement,
    asked_field,
    made_field,
    measure_video,
    motion_table,
    opposites_table,
    summarize,
    videos_table,
)
from swifti2v.data.procedural import Motion, displacement, render
from swifti2v.evaluation.motion import consecutive_pairs
from swifti2v.evaluation.seams import frame_change, seam_ratio
from swifti2v.geometry import Size

SIZE = Size(192, 112)
NUM_FRAMES = 5


def result(asked_x: float, made_x: float) -> PromptResult:
    asked, made = (MotionSummary(abs(x), x, 0.0, 0.0, 0.0) for x in (asked_x, made_x))
    evenness = dict.fromkeys(EVENNESS, 0.5)
    return PromptResult("the camera pans", asked, made, agreement=1.0, evenness=evenness, seconds=1.0)


def sliding(num_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.uniform(0, 255, (64, 160, 3)), (0, 0), 1.2)
    texture = ((texture - texture.min()) / np.ptp(texture) * 255).astype(np.uint8)
    return [texture[:, t : t + 96] for t in range(num_frames)]


@pytest.mark.parametrize(("first", "second", "holds"), [(0.7, -0.9, True), (0.7, 0.9, False), (-0.7, 0.9, False)])
def test_opposite_means_against_each_other_and_as_asked(first: float, second: float, holds: bool) -> None:
    motions = {"pan left": result(1.0, first), "pan right": result(-1.0, second)}
    assert ("**no**" in opposites_table(motions)) is not holds
    assert len(motion_table(motions).splitlines()) == 6


def test_the_measures_of_a_video_are_those_of_evaluation() -> None:
    frames = sliding(17)
    measures, kept = measure_video(iter(frames), frames[0], fps=8, segment_size=2, keep=(5, 16))
    assert measures["seam_luma"] == pytest.approx(
        seam_ratio(map(frame_change, consecutive_pairs(frames)), segment_size=2).luma
    )
    assert measures["flow_magnitude"] == pytest.approx(1, abs=0.15)
    assert list(measures["retention"]) == [8, 16]
    assert measures["detail_retention"] > 0.8
    assert measures["judder"] < 0.1
    assert sorted(kept) == [5, 16]
    assert np.array_equal(kept[16], frames[16])


def test_blur_is_seen_as_lost_detail() -> None:
    frames = sliding(9)
    soft = [frames[0], *(cv2.GaussianBlur(frame, (0, 0), 3) for frame in frames[1:])]
    measures, _ = measure_video(soft, frames[0], fps=8, segment_size=3, keep=())
    assert measures["detail_retention"] < 0.4
    assert math.isnan(measures["seam_luma"])
    lines = videos_table({"pan right": {"transport": measures, "replace": measures}}).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Smooth texture on several scales: what optical flow can follow."""
    rng = np.random.default_rng(3)
    layers = [
        cv2.resize(rng.uniform(0, 255, (n * 3 // 4, n, 3)), (320, 240), interpolation=cv2.INTER_CUBIC)
        for n in (12, 40, 80)
    ]
    return np.mean(layers, axis=0).clip(0, 255).astype(np.uint8)


def rendered(photograph: np.ndarray, name: str, speed: float = 1.0) -> np.ndarray:
    field = displacement([Motion(name, speed)], size=SIZE, num_frames=NUM_FRAMES)
    return render(photograph, field, center=(160, 120), crop_width=SIZE.width)


def test_a_shift_is_measured_in_pixels_per_frame(photograph: np.ndarray) -> None:
    frames = [photograph[20:132, 60 - 2 * t : 252 - 2 * t] for t in range(4)]
    summary = summarize(made_field(frames))
    assert summary.x == pytest.approx(2, abs=0.1)
    assert summary.magnitude == pytest.approx(2, abs=0.1)
    assert abs(summary.y) < 0.05
    assert abs(summary.zoom) < 0.05
    assert abs(summary.rotation) < 0.05


@pytest.mark.parametrize(
    ("name", "opposite", "quantity"),
    [
        ("pan left", "pan right", "x"),
        ("tilt up", "tilt down", "y"),
        ("zoom in", "zoom out", "zoom"),
        ("rotate clockwise", "rotate counterclockwise", "rotation"),
    ],
)
def test_a_rendered_prompt_does_what_it_asks(photograph: np.ndarray, name: str, opposite: str, quantity: str) -> None:
    """The renderer moves pixels, the flow finds where they went: neither knows of `asked_field`."""
    made = made_field(rendered(photograph, name))
    asked = asked_field(name, size=SIZE, num_frames=NUM_FRAMES, horizon=0.0)
    assert summarize(made).magnitude / summarize(asked).magnitude == pytest.approx(1, abs=0.2)
    assert getattr(summarize(made), quantity) == pytest.approx(getattr(summarize(asked), quantity), rel=0.2)
    assert getattr(summarize(asked), quantity) > 0
    assert agreement(made, asked) > 0.9
    assert agreement(made, asked_field(opposite, size=SIZE, num_frames=NUM_FRAMES, horizon=0.0)) < -0.8


def test_twice_the_speed_doubles_the_ratio_and_keeps_the_agreement(photograph: np.ndarray) -> None:
    made = made_field(rendered(photograph, "pan left", speed=2))
    asked = asked_field("pan left", size=SIZE, num_frames=NUM_FRAMES, horizon=0.0)
    assert summarize(made).magnitude / summarize(asked).magnitude == pytest.approx(2, abs=0.2)
    assert agreement(made, asked) > 0.9


def test_zoom_and_rotation_of_a_linear_field_are_exact() -> None:
    """Growth by 1.5% about any point, and a turn by a quarter of a degree on top."""
    angle = math.radians(0.25)
    y, x = np.mgrid[:20, :30].astype(np.float32)
    field = np.stack([0.015 * (x - 4) - angle * y, 0.015 * (y - 9) + angle * x], axis=-1)[None]
    summary = summarize(field)
    assert summary.zoom == pytest.approx(1.5, rel=1e-4)
    assert summary.rotation == pytest.approx(0.25, rel=1e-4)


def test_what_does_not_move_agrees_with_nothing() -> None:
    still = asked_field("still", size=SIZE, num_frames=3, horizon=0.0)
    moving = asked_field("pan left", size=SIZE, num_frames=3, horizon=0.0)
    assert summarize(still).magnitude == 0
    assert math.isnan(agreement(moving, still))
    assert agreement(moving, -3 * moving) == pytest.approx(-1)
