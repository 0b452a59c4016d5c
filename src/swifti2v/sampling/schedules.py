"""Noise schedules of rectified flow: plain tuples of descending sigmas.

``x_sigma = (1 - sigma) * x0 + sigma * noise``; timesteps of Wan are ``1000 * sigma``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

# The four steps at which the public Wan2.2 distillations were trained (ModelTC/Wan2.2-Lightning,
# wan/utils/fm_solvers_euler.py): linspace(1, 0, 5)[:-1] shifted by 5. The final 0.0 is left out.
FEW_STEP_SIGMAS: tuple[float, ...] = (1.0, 0.9375, 5 / 6, 0.625)


def shifted_sigmas(num_steps: int, *, shift: float, start: float = 1.0) -> tuple[float, ...]:
    """Return `num_steps` + 1 sigmas from `start` down to 0.0, evenly spaced before Wan's time shift.

    Args:
        num_steps: solver steps, >= 1.
        shift: s > 0 in ``s * u / (1 + (s - 1) * u)`` (SD3, Wan); 1 leaves the spacing even, larger values spend more
            steps at high noise.
        start: sigma_0 in (0, 1]. Below 1 the schedule is cut to its end: the part of the same curve that begins at
            `start` is divided evenly (training-free refinement starts from a noised reference).

    Raises:
        InvalidInputError: a number is out of its range.
    """
    if num_steps < 1:
        msg = f"num_steps is {num_steps}; use at least 1 step"
        raise InvalidInputError(msg)
    if not shift > 0:
        msg = f"shift is {shift}; use a positive number, for instance 5.0"
        raise InvalidInputError(msg)
    if not 0 < start <= 1:
        msg = f"the schedule starts at sigma {start}; use a value in (0, 1]"
        raise InvalidInputError(msg)
    unshifted_start = start / (shift - (shift - 1) * start)
    unshifted = (unshifted_start * (num_steps - step) / num_steps for step in range(1, num_steps + 1))
    return (float(start), *(shift * u / (1 + (shift - 1) * u) for u in unshifted))


def check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return `sigmas` as a tuple; raise `InvalidInputError` unless they fall strictly from (0, 1] to exactly 0.0."""
    values = tuple(float(sigma) for sigma in sigmas)
    if len(values) < 2 or values[-1] != 0.0:
        msg = f"the schedule {values} does not end in 0.0 after at least one step; append 0.0"
        raise InvalidInputError(msg)
    if not all(0.0 <= value <= 1.0 for value in values):
        msg = f"the schedule {values} leaves [0, 1]; give sigmas, not timesteps (divide by 1000)"
        raise InvalidInputError(msg)
    if any(after >= before for before, after in itertools.pairwise(values)):
        msg = f"the schedule {values} does not descend at every step; sort it from high to low without repeats"
        raise InvalidInputError(msg)
    return values
