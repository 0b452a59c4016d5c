"""Windows of a long clip: where they lie, and how they are joined."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.segments import plan_windows
from swifti2v.stage_one import cross_fade, match_color


@given(st.integers(0, 400), st.integers(1, 30), st.data())
def test_windows_cover_the_clip_and_overlap_as_asked(total, longest, data):
    shared = data.draw(st.integers(0, longest - 1))
    num_frames, window, overlap = 4 * total + 1, 4 * longest + 1, 4 * shared + 1
    windows = plan_windows(num_frames, window_frames=window, overlap_frames=overlap)
    assert windows[0].start == 0
    assert windows[-1].stop == num_frames
    for one, two in itertools.pairwise(windows):
        assert one.stop - two.start == overlap
        assert two.stop > one.stop
    lengths = [len(frames) for frames in windows]
    assert all(length % 4 == 1 and length <= window for length in lengths)
    assert max(lengths) - min(lengths) <= 4
    # As few as can be: one window fewer, each of full length, would not reach the end.
    reach = (len(windows) - 1) * (window - overlap) + overlap
    assert len(windows) == 1 or reach < num_frames


def test_a_clip_of_the_trained_length_is_one_window():
    assert plan_windows(81, window_frames=81, overlap_frames=5) == (range(81),)
    assert plan_windows(1, window_frames=81, overlap_frames=5) == (range(1),)


def test_work_is_linear_in_the_length():
    made = {
        n: sum(len(window) for window in plan_windows(n, window_frames=81, overlap_frames=5))
        for n in (81, 161, 321, 641, 1281)
    }
    assert all(frames <= 1.08 * n for n, frames in made.items())


@pytest.mark.parametrize(
    ("num_frames", "window", "overlap", "fix"),
    [(80, 81, 5, "77 or 81"), (81, 80, 5, "77 or 81"), (81, 81, 8, "5 or 9"), (81, 9, 9, "fewer overlapping")],
)
def test_numbers_of_another_form_are_errors(num_frames, window, overlap, fix):
    with pytest.raises(InvalidInputError, match=fix):
        plan_windows(num_frames, window_frames=window, overlap_frames=overlap)


def test_cross_fade_starts_with_the_held_frame_and_ends_with_the_new_ones():
    held, frames = torch.zeros(4, 2, 2, 3), torch.ones(9, 2, 2, 3)
    result = cross_fade(held, frames)
    assert result.shape == frames.shape
    assert result[:, 0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_cross_fade_of_equal_frames_changes_nothing():
    frames = torch.rand(9, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cross_fade(frames[:5], frames), frames)


def test_match_color_undoes_a_small_drift_of_color():
    target = torch.rand(8, 9, 3, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    true = torch.stack([target, target.flip(0), target.roll(2, 1)])
    drifted = true * torch.tensor([1.05, 0.95, 1.0]) + torch.tensor([-0.02, 0.03, 0.01])
    torch.testing.assert_close(match_color(drifted, target), true, atol=1e-5, rtol=0)


def test_match_color_leaves_matching_frames_alone_and_stays_in_range():
    frames = torch.rand(3, 8, 9, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(match_color(frames, frames[0]), frames, atol=1e-6, rtol=0)
    other = match_color(frames, torch.ones(8, 9, 3))
    assert other.min() >= 0
    assert other.max() <= 1
    assert torch.isfinite(match_color(torch.zeros(2, 4, 4, 3), torch.full((4, 4, 3), 0.5))).all()
