"""Tables, judgments and the measures of a full video."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from benchmarks.motion import PromptResult, checks, measure_video, motion_table, opposites_table, videos_table
from benchmarks.motion_fields import MotionSummary
from swifti2v.evaluation.seams import seam_ratio


def result(asked_x: float, made_x: float) -> PromptResult:
    asked, made = (MotionSummary(abs(x), x, 0.0, 0.0, 0.0) for x in (asked_x, made_x))
    return PromptResult("the camera pans", asked, made, agreement=1.0, seconds=1.0)


def sliding(num_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.uniform(0, 255, (64, 160, 3)), (0, 0), 1.2)
    texture = ((texture - texture.min()) / np.ptp(texture) * 255).astype(np.uint8)
    return [texture[:, t : t + 96] for t in range(num_frames)]


def test_a_ratio_out_of_bounds_fails_and_names_its_prompt() -> None:
    good = {"pan left": result(1.0, 0.6), "still": result(0.0, 0.1)}
    assert checks(good, {})[0].holds
    found = checks(good | {"sway": result(1.0, 2.5)}, {})[0]
    assert not found.holds
    assert "2.50 (sway)" in found.measured


@pytest.mark.parametrize(("first", "second", "holds"), [(0.7, -0.9, True), (0.7, 0.9, False), (-0.7, 0.9, False)])
def test_opposite_means_against_each_other_and_as_asked(first: float, second: float, holds: bool) -> None:
    motions = {"pan left": result(1.0, first), "pan right": result(-1.0, second)}
    assert checks(motions, {})[1].holds is holds
    assert ("**no**" in opposites_table(motions)) is not holds
    assert len(motion_table(motions).splitlines()) == 6


def test_the_measures_of_a_video_are_those_of_evaluation() -> None:
    frames = sliding(17)
    measures, kept = measure_video(iter(frames), frames[0], segment_size=2, keep=(5, 16))
    assert measures["seam_luma"] == pytest.approx(seam_ratio(frames, segment_size=2).luma)
    assert measures["mean_flow"] == pytest.approx(1, abs=0.15)
    assert list(measures["retention"]) == [8, 16]
    assert measures["mean_retention"] > 0.8
    assert sorted(kept) == [5, 16]
    assert np.array_equal(kept[16], frames[16])


def test_blur_is_seen_as_lost_detail() -> None:
    frames = sliding(9)
    soft = [frames[0], *(cv2.GaussianBlur(frame, (0, 0), 3) for frame in frames[1:])]
    measures, _ = measure_video(soft, frames[0], segment_size=3, keep=())
    assert measures["mean_retention"] < 0.4
    assert math.isnan(measures["seam_worst"])
    lines = videos_table({"pan right": {"transport": measures, "replace": measures}}).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
