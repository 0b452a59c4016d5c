"""Random windows: always those of a plan that inference could run, every kind of them, and what context is made of."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.segments import FrameKind, Segment
from swifti2v.training.refiner.windows import WindowOptions, context_slots, earlier_segments, with_finished

SEGMENT = Segment(index=0, targets=range(3, 5), before=range(2, 3), after=range(5, 6))
SHAPE = (2, 3, 5, 4, 4)


@given(st.integers(0, 2**31), st.integers(2, 41), st.integers(1, 6))
def test_windows_lie_within_the_clip(seed: int, length: int, size: int) -> None:
    segment = WindowOptions(segment_size=size).draw(np.random.default_rng(seed), length)
    assert 1 <= len(segment.targets) <= size
    assert segment.targets.start >= 1
    assert segment.window[-1] < length
    assert list(segment.window) == sorted(set(segment.window))
    assert segment.window[0] == 0


@given(st.integers(0, 2**31), st.integers(3, 21), st.integers(1, 4))
def test_a_finished_neighbor_can_be_asked_for(seed: int, length: int, size: int) -> None:
    options = WindowOptions(segment_size=size, before_share=0.0)
    segment = options.draw(np.random.default_rng(seed), length, segments_before=1)
    assert len(segment.before) == 1
    assert segment.window[-1] < length


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 4), st.integers(1, 3))
def test_earlier_segments_fit_and_meet(seed: int, spare: int, size: int, count: int) -> None:
    """They follow each other up to the targets, each but the first with M of its own, all within the clip."""
    length = 3 + (count - 1) * size + spare
    segment = WindowOptions(segment_size=size).draw(np.random.default_rng(seed), length, segments_before=count)
    earlier = earlier_segments(segment, segment_size=size, count=count)
    assert len(earlier) == count
    assert all(len(each.targets) == size for each in earlier[1:])
    assert 1 <= len(earlier[0].targets) <= size
    for each, following in pairwise([*earlier, segment]):
        assert each.targets.stop == following.targets.start
        assert following.before == range(following.targets.start - 1, following.targets.start)
    assert earlier[0].targets.start >= 1


@given(st.integers(0, 2**31), st.integers(12, 41))
def test_windows_of_one_shape_differ_in_their_place(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    shape = WindowOptions().draw_shape(rng, length)
    placed = [shape.draw_place(rng, length) for _ in range(40)]
    inside = [segment for segment in placed if segment.targets.start > 1 and segment.targets.stop < length]
    assert len({segment.kinds for segment in inside}) == 1
    assert len({segment.targets.start for segment in placed}) > 4
    assert all(len(segment.targets) == shape.num_targets and segment.window[-1] < length for segment in placed)


@pytest.mark.parametrize(("length", "segments_before"), [(1, 0), (2, 1), (5, 2)])
def test_clip_that_is_too_short(length: int, segments_before: int) -> None:
    with pytest.raises(InvalidInputError, match="use longer clips"):
        WindowOptions().draw(np.random.default_rng(0), length, segments_before=segments_before)


def test_every_kind_of_window_is_met_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    options = WindowOptions(segment_size=3, full_share=0.6, before_share=0.75, after_share=0.3, anchor_share=0.8)
    drawn = [options.draw(rng, 200) for _ in range(4000)]
    shares = {
        "full": np.mean([len(segment.targets) == 3 for segment in drawn]),
        "before": np.mean([len(segment.before) == 1 for segment in drawn]),
        "anchor": np.mean([segment.anchor for segment in drawn]),
        "after": np.mean([len(segment.after) == 1 for segment in drawn]),
    }
    assert shares == pytest.approx({"full": 0.6, "before": 0.75, "anchor": 0.8, "after": 0.3}, abs=0.04)


@pytest.mark.parametrize("options", [{"segment_size": 0}, {"full_share": 1.5}, {"after_share": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"within 0..1|at least 1"):
        WindowOptions(**options)


def test_what_is_finished_is_written_back() -> None:
    truth, reference = torch.ones(SHAPE), torch.zeros(SHAPE)
    written = with_finished(reference, truth, SEGMENT)
    assert written.mean(dim=(0, 1, 3, 4)).tolist() == [1, 1, 0, 0, 0]  # anchor, finished, two targets, unrefined
    assert not reference.any()


def test_slots_hold_truth_noise_and_reference() -> None:
    truth, reference = torch.full(SHAPE, 5.0), torch.zeros(SHAPE)
    slots = context_slots(truth, reference, SEGMENT, noise_deviation=0.5, generator=torch.Generator().manual_seed(0))
    for place, kind in enumerate(SEGMENT.kinds):
        frame = slots[:, :, place]
        if kind is FrameKind.UNREFINED:
            assert torch.equal(frame, reference[:, :, place])
        elif kind is FrameKind.FINISHED:
            assert 0 < float((frame - 5).abs().mean()) < 0.5
        else:
            assert torch.equal(frame, truth[:, :, place])
    exact = context_slots(truth, reference, SEGMENT, noise_deviation=0.0, generator=torch.Generator())
    assert torch.equal(exact[:, :, :4], truth[:, :, :4])
