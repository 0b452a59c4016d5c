"""Names and states of jobs."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.jobs.state import ACTIVE_STATES, FINAL_STATES, FOLLOWERS, JobState, is_job_id, new_job_id


def test_a_final_state_is_final_and_every_state_can_end() -> None:
    assert {state.value for state in FINAL_STATES} == {"completed", "failed", "cancelled"}
    assert set(FINAL_STATES) | set(ACTIVE_STATES) == set(JobState)
    for start in JobState:
        reached, front = {start}, {start}
        while front:
            front = {after for state in front for after in FOLLOWERS[state]} - reached
            reached |= front
        assert reached & set(FINAL_STATES)
        assert (reached == {start}) == start.is_final


def test_names_are_new_and_cannot_be_guessed() -> None:
    names = {new_job_id() for _ in range(1000)}
    assert len(names) == 1000
    assert all(is_job_id(name) for name in names)
    assert min(len(set(column)) for column in zip(*(name.removeprefix("video_") for name in names), strict=True)) == 16


@given(st.text(max_size=60) | st.text(alphabet=string.hexdigits + "/.\\\0\n", max_size=60).map("video_".__add__))
def test_only_names_of_ours_pass(text: str) -> None:
    allowed = text.startswith("video_") and len(text) == 38 and not set(text[6:]) - set("0123456789abcdef")
    assert is_job_id(text) == allowed


@pytest.mark.parametrize("tail", ["\n", "/..", "/../../etc/passwd", "\0"])
def test_no_tail_passes(tail: str) -> None:
    assert not is_job_id(new_job_id() + tail)
