"""The three scores of VBench-I2V: published rows, VBench's own treatment of what is missing, files of results."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.evaluation.vbench.total import (
    DIMENSION_NAMES,
    DIMENSIONS,
    check_dimensions,
    read_scores,
    total_scores,
)
from tests.evaluation.vbench_checkout import MAGI_ONE

if TYPE_CHECKING:
    from pathlib import Path


# Rows of the VBench-I2V leaderboard as Shopee-MUG/MUG-V-Megatron-LM-Training prints them (examples/mugv/README.md at
# 26da251, "VBench-I2V Quantitative Comparison"): nine scores, then I2V, Quality and Total.
ORDER = (
    "camera_motion",
    "i2v_subject",
    "i2v_background",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
PUBLISHED = {
    "CogVideoX": (67.68, 97.19, 96.74, 94.34, 96.42, 98.40, 33.17, 61.87, 70.01, 94.79, 78.61, 86.70),
    "STIV": (11.17, 98.96, 97.35, 98.40, 98.39, 99.61, 15.28, 66.00, 70.81, 93.48, 79.98, 86.73),
    "Step-Video": (49.23, 97.86, 98.63, 96.02, 97.06, 99.24, 48.78, 62.29, 70.44, 95.50, 81.22, 88.36),
    "Dynamic-I2V": (88.10, 98.83, 98.97, 96.21, 98.39, 98.88, 27.15, 60.10, 69.23, 98.12, 78.78, 88.45),
    "HunyuanVideo": (49.91, 98.53, 97.37, 95.26, 96.70, 99.23, 22.20, 62.55, 70.14, 95.10, 78.54, 86.82),
    "Wan2.1": (34.76, 96.95, 96.44, 94.86, 97.07, 97.90, 51.38, 64.75, 70.44, 92.90, 80.82, 86.86),
    "MAGI-1": (50.85, 98.39, 99.00, 93.96, 96.74, 98.68, 68.21, 64.74, 69.71, 96.12, 82.44, 89.28),
    "MUG-V": (23.17, 98.82, 99.51, 95.73, 98.52, 98.90, 57.24, 61.37, 68.48, 95.37, 81.55, 88.46),
}
ROUNDING = 0.0127
"""Half a unit in the last digit of a total, and what half a unit of every score can move it by: most of all Quality."""


def published_scores(name: str) -> dict[str, float]:
    return {dimension: score / 100 for dimension, score in zip(ORDER, PUBLISHED[name], strict=False)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name: str) -> None:
    totals = total_scores(published_scores(name))
    found = [100 * value for value in (totals.i2v, totals.quality, totals.total)]
    assert found == pytest.approx(PUBLISHED[name][-3:], abs=ROUNDING)


def test_nine_dimensions_of_which_three_are_of_the_image() -> None:
    assert len(DIMENSIONS) == len(set(DIMENSION_NAMES)) == 9
    weights = {group: sum(each.weight for each in DIMENSIONS if each.group == group) for group in ("i2v", "quality")}
    assert weights == pytest.approx({"i2v": 2.1, "quality": 5.5})


def test_bounds_give_zero_and_one_and_nothing_is_clipped() -> None:
    lowest = total_scores({each.name: each.minimum for each in DIMENSIONS})
    highest = total_scores({each.name: each.maximum for each in DIMENSIONS})
    assert (lowest.i2v, lowest.quality, lowest.total) == pytest.approx((0, 0, 0))
    assert (highest.i2v, highest.quality, highest.total) == pytest.approx((1, 1, 1))
    smooth = next(each for each in DIMENSIONS if each.name == "motion_smoothness")
    assert smooth.normalized(1.0) == pytest.approx(1.0086, abs=1e-4)


def test_a_tenth_of_a_point_moves_the_score_by_its_weight() -> None:
    """The total is linear in each score, with slope weight / (maximum - minimum) / sum of weights / 2."""
    before = total_scores(MAGI_ONE).total
    for each in DIMENSIONS:
        after = total_scores({**MAGI_ONE, each.name: MAGI_ONE[each.name] - 0.1}).total
        weights = 2.1 if each.group == "i2v" else 5.5
        assert before - after == pytest.approx(0.1 * each.weight / (each.maximum - each.minimum) / weights / 2)


def test_missing_dimensions_are_an_error_or_vbenchs_zero() -> None:
    scores = {name: value for name, value in MAGI_ONE.items() if name != "camera_motion"}
    with pytest.raises(InvalidInputError, match=r"no score of camera_motion; .*--missing-as-zero"):
        total_scores(scores)
    totals = total_scores(scores, missing_as_zero=True)
    assert total_scores(MAGI_ONE).i2v - totals.i2v == pytest.approx(0.1 * MAGI_ONE["camera_motion"] / 2.1)
    assert totals.notes == ("counted as 0, so not to be compared with complete rows: camera_motion",)
    without_subject = total_scores(
        {name: value for name, value in MAGI_ONE.items() if name != "i2v_subject"}, missing_as_zero=True
    )
    fall = (MAGI_ONE["i2v_subject"] - 0) / (1 - 0.1462) / 2.1  # 0 lies below the lower bound, and counts as such
    assert total_scores(MAGI_ONE).i2v - without_subject.i2v == pytest.approx(fall)


def test_flickering_is_left_out_with_a_note() -> None:
    totals = total_scores({**MAGI_ONE, "temporal_flickering": 0.99})
    assert totals.total == total_scores(MAGI_ONE).total
    assert "temporal_flickering" not in totals.scores
    assert "temporal_flickering" in totals.notes[0]


def test_a_still_video_is_pointed_out() -> None:
    frozen = dict.fromkeys(DIMENSION_NAMES, 1.0) | {"dynamic_degree": 0.0}
    assert any("a still picture" in note for note in total_scores(frozen).notes)
    assert not any("a still picture" in note for note in total_scores(MAGI_ONE).notes)


@pytest.mark.parametrize("value", [98.39, -0.1, math.nan, math.inf])
def test_scores_are_fractions(value: float) -> None:
    with pytest.raises(InvalidInputError, match=r"i2v_subject is .*fractions"):
        total_scores({**MAGI_ONE, "i2v_subject": value})


def test_unknown_dimensions() -> None:
    with pytest.raises(InvalidInputError, match="object_class: not a dimension"):
        total_scores({**MAGI_ONE, "object_class": 0.5})
    with pytest.raises(InvalidInputError, match="temporal_flickering"):
        check_dimensions(["temporal_flickering"])
    assert check_dimensions(["imaging_quality", "i2v_subject", "imaging_quality"]) == ("i2v_subject", "imaging_quality")


def test_results_are_read_from_a_folder_in_both_of_vbenchs_forms(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a_eval_results.json").write_text(json.dumps({"i2v_subject": [0.98, [{"video_path": "x"}]]}))
    (tmp_path / "deeper" / "b_eval_results.json").write_text('{"camera_motion": [0.5, {"static": NaN}, []]}')
    (tmp_path / "a_full_info.json").write_text("[]")
    assert read_scores(tmp_path) == {"i2v_subject": 0.98, "camera_motion": 0.5}
    (tmp_path / "scores.json").write_text(json.dumps(MAGI_ONE))
    assert read_scores(tmp_path / "scores.json") == MAGI_ONE == pytest.approx(published_scores("MAGI-1"))


def test_unequal_results_of_a_dimension(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({"i2v_subject": [value, []]}))
    with pytest.raises(InvalidInputError, match="another score of i2v_subject"):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"i2v_subject": []}', '{"i2v_subject": [NaN]}', '{"i2v_subject": true}']
)
def test_damaged_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "x_eval_results.json").write_text(content)
    with pytest.raises(InvalidInputError):
        read_scores(tmp_path)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        read_scores(tmp_path)
