"""Solvers against diffusers' Euler scheduler and against exact solutions."""

from __future__ import annotations

import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.sampling.schedules import FEW_STEP_SIGMAS, shifted_sigmas
from swifti2v.sampling.solvers import euler, renoise

SIGMAS = (*FEW_STEP_SIGMAS, 0.0)


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A velocity field that mixes its inputs and depends on the level."""
    return torch.tanh(x.roll(1, dims=-1)) * (0.3 + sigma) - 0.5 * x


def prediction(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x - sigma * velocity(x, sigma)


@pytest.mark.parametrize("sigmas", [SIGMAS, shifted_sigmas(9, shift=3.0), shifted_sigmas(3, shift=5.0, start=0.6)])
def test_euler_equals_diffusers(sigmas):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(sigmas[:-1]))
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    theirs = x
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        theirs = scheduler.step(velocity(theirs, sigma), timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(euler(prediction, x, sigmas), theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_perfect_denoiser_is_returned_exactly(num_steps):
    clean = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    sigmas = shifted_sigmas(num_steps, shift=5.0)
    assert torch.equal(euler(lambda x, sigma: clean, noise, sigmas), clean)
    assert torch.equal(renoise(lambda x, sigma: clean, noise, sigmas, noise=lambda i: noise), clean)


def test_euler_stays_on_the_line_from_noise_to_the_prediction():
    clean, noise = torch.full((4,), 3.0), torch.full((4,), -1.0)
    seen = []

    def denoise(x, sigma):
        seen.append((x.clone(), sigma))
        return clean

    euler(denoise, noise, SIGMAS)
    assert [sigma for _, sigma in seen] == list(FEW_STEP_SIGMAS)
    for x, sigma in seen:
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise)


def test_renoise_mixes_the_prediction_with_the_noise_of_that_level():
    clean = torch.full((3,), 2.0)
    seen, asked = [], []

    def denoise(x, sigma):
        seen.append(x.clone())
        return clean

    def noise(step):
        asked.append(step)
        return torch.full((3,), 10.0 * step)

    result = renoise(denoise, torch.zeros(3), (1.0, 0.5, 0.25, 0.0), noise=noise)
    assert asked == [1, 2]
    torch.testing.assert_close(seen[1], 0.5 * clean + 0.5 * torch.full((3,), 10.0))
    torch.testing.assert_close(seen[2], 0.75 * clean + 0.25 * torch.full((3,), 20.0))
    assert torch.equal(result, clean)


@pytest.mark.parametrize("solver", [euler, renoise])
def test_steps_are_reported_and_an_exception_stops_at_once(solver):
    calls, steps = [], []

    def denoise(x, sigma):
        calls.append(sigma)
        return x

    solver(denoise, torch.zeros(3), SIGMAS, noise=lambda i: torch.zeros(3), on_step=lambda *step: steps.append(step))
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]
    calls.clear()

    def cancel(step, num_steps):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solver(denoise, torch.zeros(3), SIGMAS, noise=lambda i: torch.zeros(3), on_step=cancel)
    assert len(calls) == 2


def test_a_bfloat16_prediction_does_not_round_the_sample():
    x = torch.randn(64, generator=torch.Generator().manual_seed(3))
    result = euler(lambda x, sigma: torch.zeros_like(x, dtype=torch.bfloat16), x, (1.0, 0.5, 0.0))
    assert result.dtype == torch.float32


@pytest.mark.parametrize("solver", [euler, renoise])
def test_a_denoiser_of_another_shape_is_an_error(solver):
    with pytest.raises(InvalidInputError, match="keep the shape"):
        solver(lambda x, sigma: x[:1], torch.zeros(3), SIGMAS, noise=lambda i: torch.zeros(3))


@pytest.mark.parametrize("solver", [euler, renoise])
def test_a_bad_schedule_is_an_error(solver):
    with pytest.raises(InvalidInputError):
        solver(lambda x, sigma: x, torch.zeros(3), (0.5, 1.0, 0.0), noise=lambda i: torch.zeros(3))
