"""Solvers: functions of a callable ``denoise(x, sigma) -> x0`` and a schedule; they never see a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from swifti2v.errors import InvalidInputError
from swifti2v.sampling.schedules import check_sigmas

Denoiser = Callable[[Tensor, float], Tensor]
"""``(x, sigma) -> x0``: the clean prediction for `x` at noise level `sigma`, of the shape of `x`."""

OnStep = Callable[[int, int], None]
"""``(step_index, num_steps)``, called after each step (0-based). An exception raised in it stops the solver at once."""


class Solver(Protocol):
    """What `sample_segments` calls: `euler`, `renoise`, or a function of the same form."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        sigmas: Sequence[float],
        *,
        noise: Callable[[int], Tensor],
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Take `x` from ``sigmas[0]`` to 0; ``noise(i)`` is fresh noise, shaped as `x`, for the level ``sigmas[i]``."""
        ...


def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Callable[[int], Tensor] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate the flow with Euler steps (deterministic; what the Wan2.2 distillations expect).

    The step ``x + (s' - s) * v`` with ``v = (x - x0) / s`` is written as ``lerp(x0, x, s' / s)``; the last step returns
    the prediction itself.

    Args:
        denoise: clean prediction at a noise level.
        x: any shape, at the noise level ``sigmas[0]``.
        sigmas: strictly descending in [0, 1], the last 0.0 (`check_sigmas`).
        noise: ignored, nothing is random here; accepted so that solvers interchange.
        on_step: called after each step.

    Returns:
        The clean sample, shape and dtype of `x`.

    Raises:
        InvalidInputError: the schedule is not one.
    """
    del noise
    values = check_sigmas(sigmas)
    num_steps = len(values) - 1
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(values)):
        clean = _checked(denoise(x, sigma), x)
        x = torch.lerp(clean, x, sigma_next / sigma) if sigma_next > 0 else clean
        if on_step is not None:
            on_step(step, num_steps)
    return x


def renoise(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """Predict, then noise the prediction afresh at the next level (LCM / DMD sampling; Wan2.2-TI2V-5B-Turbo).

    Args:
        denoise: clean prediction at a noise level.
        x: any shape, at the noise level ``sigmas[0]``.
        sigmas: strictly descending in [0, 1], the last 0.0 (`check_sigmas`).
        noise: ``noise(i)`` is unit Gaussian noise of the shape of `x` for the level ``sigmas[i]``, ``0 < i < len - 1``.
        on_step: called after each step.

    Returns:
        The clean sample, shape and dtype of `x`.

    Raises:
        InvalidInputError: the schedule is not one.
    """
    values = check_sigmas(sigmas)
    num_steps = len(values) - 1
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(values)):
        clean = _checked(denoise(x, sigma), x)
        x = torch.lerp(clean, noise(step + 1).to(clean), sigma_next) if sigma_next > 0 else clean
        if on_step is not None:
            on_step(step, num_steps)
    return x


def _checked(clean: Tensor, x: Tensor) -> Tensor:
    if clean.shape != x.shape:
        msg = f"the denoiser returned shape {tuple(clean.shape)} for {tuple(x.shape)}; it must keep the shape"
        raise InvalidInputError(msg)
    return clean.to(x.dtype)
