"""The speed benchmark: ratios are of the right things, and its comparisons hold their outputs equal."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import speed
from benchmarks.speed import Ratio, best_seconds, checks, kept_context, kept_text, segments_against_full_sequence
from swifti2v.models.text_attention import TextKeysValues

if TYPE_CHECKING:
    import torch


def test_a_ratio_says_how_many_times_faster_ours_is() -> None:
    assert Ratio("walking", other_seconds=6.0, seconds=2.0, goal=2.5).ratio == 3.0


def test_the_best_of_a_few_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(speed.time, "thread_time", lambda: next(ticks))
    runs = count()
    assert best_seconds(lambda: next(runs), repeats=3) == 2.0
    assert next(runs) == 3


def test_misses_are_told_from_goals_that_are_met() -> None:
    ratios = [Ratio("met", 2.0, 1.0, goal=1.5), Ratio("missed", 2.0, 1.0, goal=2.5)]
    found = checks(ratios, overhead=0.01, help_time=0.7)
    assert [check.holds for check in found] == [True, False, True, False]
    assert found[1].measured == "2.00x"


def test_a_kept_text_that_changed_the_output_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_text(1).seconds > 0
    attend = TextKeysValues.attend
    monkeypatch.setattr(TextKeysValues, "attend", lambda *arguments: attend(*arguments) + 1e-3)
    with pytest.raises(AssertionError, match="changes the output"):
        kept_text(1)


def test_segments_see_every_frame_and_the_full_sequence_sees_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.models.transformer import StageTwoTransformer

    seen: list[int] = []
    made: list[int] = []

    def forward(self: StageTwoTransformer, frames: torch.Tensor, *_: object, output_frames: slice) -> None:
        seen.append(frames.shape[2])
        made.append(output_frames.stop - output_frames.start)

    monkeypatch.setattr(StageTwoTransformer, "forward", forward)
    segments_against_full_sequence(8, 2.0, repeats=1)
    # A warm-up of five; targets 1-3, 4-6 and 7 with the anchor and one neighbour; the clip.
    assert seen == [5, 4, 5, 3, 8]
    assert made == [3, 3, 3, 1, 7]


def test_kept_context_is_seen_in_the_first_step_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.models.transformer import StageTwoTransformer

    seen: list[int] = []
    forward = StageTwoTransformer.forward

    def watched(self: StageTwoTransformer, frames: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(frames.shape[2])
        return forward(self, frames, *arguments, **options)

    monkeypatch.setattr(StageTwoTransformer, "forward", watched)
    kept_context(6, 2.0, repeats=1)
    # A warm-up of one segment; targets 1-3 and 4-5 with the anchor and one neighbour; the clip.
    assert seen == [4, 3, 3, 3, 4, 3, 3, 3, 4, 2, 2, 2, 6]
