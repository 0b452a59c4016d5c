"""Schedules against diffusers' own shift and the published timesteps."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.sampling.schedules import FEW_STEP_SIGMAS, check_sigmas, shifted_sigmas


def test_four_steps_are_the_published_timesteps():
    # ModelTC/LightX2V-Wan2.2-Lightning issue 3: [1000.0000, 937.5001, 833.3333, 625.0000, 0]
    assert [round(1000 * sigma, 3) for sigma in FEW_STEP_SIGMAS] == [1000, 937.5, 833.333, 625]


def test_few_step_sigmas_lie_on_the_curve_of_shift_5():
    assert shifted_sigmas(4, shift=5.0) == pytest.approx((*FEW_STEP_SIGMAS, 0.0), abs=1e-15)


def test_eight_steps_are_the_maintainers_list():
    expected = [1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67, 0]
    assert [1000 * sigma for sigma in shifted_sigmas(8, shift=5.0)] == pytest.approx(expected, abs=5e-3)


def test_shift_agrees_with_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - step / 7 for step in range(7)])
    assert shifted_sigmas(7, shift=3.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@given(st.integers(1, 60), st.floats(0.2, 20.0), st.floats(0.01, 1.0))
def test_schedules_start_where_asked_and_descend_to_zero(num_steps, shift, start):
    sigmas = shifted_sigmas(num_steps, shift=shift, start=start)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == start
    assert check_sigmas(sigmas) == sigmas


def test_a_truncated_schedule_is_the_end_of_the_whole_one():
    whole = shifted_sigmas(8, shift=5.0)
    assert shifted_sigmas(3, shift=5.0, start=whole[5]) == pytest.approx(whole[5:], abs=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "settings"),
    [(0, {"shift": 5.0}), (4, {"shift": 0.0}), (4, {"shift": 5.0, "start": 0.0}), (4, {"shift": 5.0, "start": 1.01})],
)
def test_numbers_out_of_range_are_errors(num_steps, settings):
    with pytest.raises(InvalidInputError):
        shifted_sigmas(num_steps, **settings)


@pytest.mark.parametrize(
    ("sigmas", "fix"),
    [
        ((), "append 0.0"),
        ((0.0,), "append 0.0"),
        ((1.0, 0.5), "append 0.0"),
        ((1000.0, 500.0, 0.0), "divide by 1000"),
        ((1.0, -0.1, 0.0), "divide by 1000"),
        ((0.5, 0.9, 0.0), "sort it"),
        ((1.0, 0.5, 0.5, 0.0), "sort it"),
        ((1.0, float("nan"), 0.0), "divide by 1000"),
    ],
)
def test_a_schedule_that_is_not_one_is_an_error_that_names_the_fix(sigmas, fix):
    with pytest.raises(InvalidInputError, match=fix):
        check_sigmas(sigmas)


def test_few_step_sigmas_are_those_of_the_scheduler():
    import inspect

    from swifti2v.schedulers import FixedSigmaScheduler

    default = inspect.signature(FixedSigmaScheduler.__init__).parameters["fixed_sigmas"].default
    assert tuple(default) == FEW_STEP_SIGMAS
    assert all(before > after for before, after in itertools.pairwise(default))
