"""The plan of segments: partition, bound and order, for every small case and for random large ones."""

from __future__ import annotations

import itertools
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.segments import FrameKind, Segment, max_window, plan_segments, plan_windows


def check_plan(
    plan: tuple[Segment, ...], total: int, size: int, before: int, after: int, *, anchor: bool = True
) -> None:
    # Every latent frame >= 1 is a target exactly once, in order.
    assert [frame for segment in plan for frame in segment.targets] == list(range(1, total))
    assert [segment.index for segment in plan] == list(range(len(plan)))
    bound = anchor + before + size + after
    for segment in plan:
        window = segment.window
        assert (window[0] == 0) == (anchor or segment.index * size < before)
        assert len(segment.kinds) == len(window)
        assert (segment.kinds[0] is FrameKind.ANCHOR) == anchor
        assert FrameKind.ANCHOR not in segment.kinds[1:]
        assert all(a < b for a, b in itertools.pairwise(window))
        assert window[-1] < total
        assert len(window) <= bound
        start, stop = segment.targets.start, segment.targets.stop
        assert start == 1 + segment.index * size
        assert list(segment.before) == [j for j in range(start - before, start) if j >= anchor]
        assert list(segment.after) == [j for j in range(stop, stop + after) if j < total]
        assert window[segment.target_slice] == tuple(segment.targets)
        assert {window[place] for place, kind in enumerate(segment.kinds) if kind is FrameKind.TARGET} == set(
            segment.targets
        )


def is_sound(plan: tuple[Segment, ...], total: int, bound: int, *, anchor: bool = True) -> bool:
    """The three properties alone, quick enough for 24,960 plans: partition, bound, order."""
    last = total - 1
    windows = [segment.window for segment in plan]
    targets = itertools.chain.from_iterable(segment.targets for segment in plan)
    return list(targets) == list(range(1, total)) and all(
        (not anchor or window[0] == 0)
        and window[-1] <= last
        and len(window) <= bound
        and sorted(set(window)) == list(window)
        for window in windows
    )


@pytest.mark.parametrize(("longest", "anchor"), [(200, True), (60, False)])
@pytest.mark.parametrize("size", range(1, 7))
def test_every_small_plan(size, longest, anchor):
    unsound = [
        (total, before, after)
        for total, before, after in itertools.product(range(1, longest + 1), range(4), range(4))
        if not is_sound(
            plan_segments(total, segment_size=size, neighbors_before=before, neighbors_after=after, anchor=anchor),
            total,
            anchor + before + size + after,
            anchor=anchor,
        )
    ]
    assert unsound == []


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(0, 40), st.integers(0, 40), st.booleans())
@settings(deadline=None)
def test_any_plan(total, size, before, after, anchor):
    plan = plan_segments(total, segment_size=size, neighbors_before=before, neighbors_after=after, anchor=anchor)
    check_plan(plan, total, size, before, after, anchor=anchor)
    assert max((len(segment.window) for segment in plan), default=0) <= max_window(size, before, after, anchor=anchor)


def test_the_paper_case():
    # 81 frames are 21 latent frames: seven segments of M = 3, the neighbor before (figure CSG).
    plan = plan_segments(21)
    assert len(plan) == 7
    assert plan[0].window == (0, 1, 2, 3)
    assert plan[1].window == (0, 3, 4, 5, 6)
    assert plan[6].window == (0, 18, 19, 20)


@pytest.mark.parametrize(("anchor", "bound"), [(True, 7), (False, 6)])
def test_the_bound_is_reached(anchor, bound):
    plan = plan_segments(30, segment_size=3, neighbors_before=2, neighbors_after=1, anchor=anchor)
    assert max(len(segment.window) for segment in plan) == max_window(3, 2, 1, anchor=anchor) == bound


def test_without_the_anchor_frame_0_is_a_finished_frame_like_any_other():
    plan = plan_segments(9, segment_size=3, neighbors_before=2, neighbors_after=1, anchor=False)
    assert [segment.window for segment in plan] == [(0, 1, 2, 3, 4), (2, 3, 4, 5, 6, 7), (5, 6, 7, 8)]
    assert plan[0].kinds == (FrameKind.FINISHED, *[FrameKind.TARGET] * 3, FrameKind.UNREFINED)
    assert plan[1].positions("compact") == (0, 1, 2, 3, 4, 5)


def test_independent_segments():
    """No neighbors: with the anchor beside the targets, or without it the targets alone."""
    assert [segment.window for segment in plan_segments(6, neighbors_before=0)] == [(0, 1, 2, 3), (0, 4, 5)]
    assert [segment.window for segment in plan_segments(6, neighbors_before=0, anchor=False)] == [(1, 2, 3), (4, 5)]


def test_kinds_name_each_place_of_the_window():
    segment = plan_segments(13, segment_size=3, neighbors_before=2, neighbors_after=1)[1]
    assert segment.window == (0, 2, 3, 4, 5, 6, 7)
    assert segment.kinds == (
        FrameKind.ANCHOR,
        FrameKind.FINISHED,
        FrameKind.FINISHED,
        FrameKind.TARGET,
        FrameKind.TARGET,
        FrameKind.TARGET,
        FrameKind.UNREFINED,
    )


def test_positions():
    segment = plan_segments(13, segment_size=3)[2]
    assert segment.positions() == segment.window == (0, 6, 7, 8, 9)
    assert segment.positions("compact") == (0, 1, 2, 3, 4)


def test_kind_values_index_a_table():
    # They are written into checkpoints (an embedding table), so they may not move.
    assert {kind.name: kind.value for kind in FrameKind} == {"TARGET": 0, "ANCHOR": 1, "FINISHED": 2, "UNREFINED": 3}


def test_one_frame_has_no_segments():
    assert plan_segments(1) == ()


@pytest.mark.parametrize(
    ("total", "settings", "name"),
    [
        (0, {}, "num_latent_frames"),
        (5, {"segment_size": 0}, "segment_size"),
        (5, {"neighbors_before": -1}, "neighbors_before"),
        (5, {"neighbors_after": -1}, "neighbors_after"),
    ],
)
def test_numbers_out_of_range_are_named(total, settings, name):
    with pytest.raises(InvalidInputError, match=name):
        plan_segments(total, **settings)


@given(
    frames=st.integers(0, 300).map(lambda count: 4 * count + 1),
    window=st.integers(3, 25).map(lambda count: 4 * count + 1),
    overlap=st.sampled_from([1, 5, 9]),
)
@settings(deadline=None)
def test_windows_cover_a_long_clip_and_are_as_few_as_can_be(frames: int, window: int, overlap: int) -> None:
    lengths = [len(part) for part in plan_windows(frames, window_frames=window, overlap_frames=overlap)]
    assert sum(lengths) - overlap * (len(lengths) - 1) == frames
    assert len(lengths) == max(1, ceil((frames - overlap) / (window - overlap)))
    assert max(lengths) <= window


def test_unknown_positions_are_refused() -> None:
    segment = plan_segments(5)[0]
    with pytest.raises(InvalidInputError, match="absolute or compact"):
        segment.positions("relative")  # type: ignore[arg-type]
