"""The speed benchmark: ratios are of the right things, and its comparisons hold their outputs equal."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import speed as timing
from benchmarks.speed import (
    TOKENS_PER_FRAME,
    Ratio,
    best_seconds,
    compiled_forwards,
    kept_context,
    kept_text,
    least_seconds,
    segments_against_full_sequence,
    stage_two_forward,
)
from swifti2v.wan.text_attention import TextKeysValues

if TYPE_CHECKING:
    import torch


def test_a_ratio_says_how_many_times_faster_ours_is() -> None:
    assert Ratio("walking", other_seconds=6.0, seconds=2.0).ratio == 3.0
    assert TOKENS_PER_FRAME == 132


def test_the_best_of_a_few_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(timing.time, "thread_time", lambda: next(ticks))
    runs = count()
    assert best_seconds(lambda: next(runs), repeats=3) == 2.0
    assert next(runs) == 3


def test_ways_take_turns_and_turn_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(timing.time, "thread_time", lambda: float(next(clock)))
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}  # type: ignore[misc]
    assert least_seconds(ways, rounds=3) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert "".join(order) == "abccbaabc"


def test_a_forward_that_differed_from_diffusers_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.wan.transformer import StageTwoTransformer

    assert stage_two_forward(1, targets_only=True).seconds > 0
    head = StageTwoTransformer._head
    monkeypatch.setattr(StageTwoTransformer, "_head", lambda *arguments: head(*arguments) + 1e-2)
    with pytest.raises(AssertionError, match="not close"):
        stage_two_forward(1, targets_only=False)


@pytest.mark.slow
def test_compiled_blocks_are_compared_with_both_forms_of_diffusers_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the one length of window; traced only, for the code is the compiler's."""
    import torch

    from swifti2v.runner import acceleration

    torch._dynamo.reset()
    compile_blocks = acceleration.compile_blocks
    monkeypatch.setattr(acceleration, "compile_blocks", lambda networks: compile_blocks(networks, backend="eager"))
    eager, compiled = compiled_forwards(1)
    assert (eager.graphs, compiled.graphs) == (1, 1)
    assert eager.seconds == compiled.seconds
    assert eager.other_seconds != compiled.other_seconds


def test_a_kept_text_that_changed_the_output_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_text(1).seconds > 0
    attend = TextKeysValues.attend
    monkeypatch.setattr(TextKeysValues, "attend", lambda *arguments: attend(*arguments) + 1e-3)
    with pytest.raises(AssertionError, match="changes the output"):
        kept_text(1)


def test_segments_see_every_frame_and_the_full_sequence_sees_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.wan.transformer import StageTwoTransformer

    seen: list[int] = []
    made: list[int] = []

    def forward(self: StageTwoTransformer, frames: torch.Tensor, *_: object, output_frames: slice) -> None:
        seen.append(frames.shape[2])
        made.append(output_frames.stop - output_frames.start)

    monkeypatch.setattr(StageTwoTransformer, "forward", forward)
    segments_against_full_sequence(8, repeats=1)
    # A warm-up of five; targets 1-3, 4-6 and 7 with the anchor and one neighbor; the clip.
    assert seen == [5, 4, 5, 3, 8]
    assert made == [3, 3, 3, 1, 7]


def test_kept_context_is_seen_in_the_first_step_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.wan.transformer import StageTwoTransformer

    seen: list[int] = []
    forward = StageTwoTransformer.forward

    def watched(self: StageTwoTransformer, frames: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(frames.shape[2])
        return forward(self, frames, *arguments, **options)

    monkeypatch.setattr(StageTwoTransformer, "forward", watched)
    kept_context(6, repeats=1)
    # A warm-up of one segment; targets 1-3 and 4-5 with the anchor and one neighbor; the clip.
    assert seen == [4, 3, 3, 3, 4, 3, 3, 3, 4, 2, 2, 2, 6]
