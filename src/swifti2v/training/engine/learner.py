"""A network that is trained: its optimiser, the average of its weights, one step, and all of it as a checkpoint's part.

A run has one learner, or two: a `Critic` is a second network that the objective of the first asks, and that follows it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor

from swifti2v.errors import ConfigurationError
from swifti2v.memory.training_cost import Optimizer  # noqa: TC001 - a field of what recipes hold
from swifti2v.training.engine.distributed import forget_gathered, whole
from swifti2v.training.engine.failures import InputRecorder
from swifti2v.training.engine.optimizers import (
    load_whole_state,
    make_optimizer,
    set_learning_rate,
    take_step,
    whole_state,
)
from swifti2v.training.engine.trained_state import (
    load_own_state,
    own_state,
    placed_average,
    trained_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from swifti2v.training.engine.distributed import Processes, Sharding


class Objective(Protocol):
    """What a recipe trains: a module holding every trained weight, and the loss of a batch."""

    module: nn.Module

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise and numbers for the log; a function of the weights and `step` only.

        `step` is the number of the batch: that of the step in one process without accumulation. Numbers named
        "samples", "tokens" and "tflop" are amounts of work (`throughput.AMOUNTS`); others are averaged.
        """
        ...


@dataclass(frozen=True)
class Critic:
    """A second network, trained by an objective of its own before every step of the first (two time scales).

    It is moved, spread, clipped, checkpointed and resumed as the first is, and has no average: nobody keeps it.

    Args:
        objective: of the critic; no number of it is an amount of work.
        steps_per_step: its optimiser steps before each of the first network's.
        learning_rate: peak; warm-up and decay are those of the loop.
        betas: of its AdamW.

    Raises:
        ConfigurationError: `steps_per_step` is below 1.
    """

    objective: Objective
    steps_per_step: int
    learning_rate: float
    betas: tuple[float, float]

    def __post_init__(self) -> None:
        if self.steps_per_step < 1:
            msg = f"critic_steps_per_step is {self.steps_per_step}; it must be at least 1"
            raise ConfigurationError(msg)


@dataclass(frozen=True)
class LearnerOptions:
    """How weights follow their gradients; see `LoopOptions`. Without an `ema_decay` no average is held."""

    optimizer: Optimizer
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    gradient_clip: float
    ema_decay: float | None


class Learner:
    """An objective's network with what a step needs and changes.

    Args:
        objective: its module is moved to the device of `processes` and spread over them.
        options: see there.
        processes: that train together.
        sharding: of the weights.

    Attributes:
        objective, options: as given.
        inputs: what its networks were last called with.
        skipped_in_a_row: steps whose gradient was not finite, up to now.
    """

    def __init__(
        self, objective: Objective, options: LearnerOptions, *, processes: Processes, sharding: Sharding
    ) -> None:
        self.objective = objective
        processes.distribute(objective.module, sharding)
        self.inputs = InputRecorder(objective.module)
        self.skipped_in_a_row = 0
        self.options = options
        self._device = processes.device
        self._parameters = trained_parameters(objective.module)
        self._optimizer = make_optimizer(
            options.optimizer,
            self._parameters,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            betas=options.betas,
        )
        decay = options.ema_decay
        self._average = None if decay is None else EMAModel(self._parameters, decay=decay)

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Follow the gradients that have been added up, and forget them.

        Returns:
            The norm of the gradient before clipping, and whether it was finite; if not, 0, and nothing has changed.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.options.gradient_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # bfloat16 can overflow in one gradient of thousands of steps; that step is left out and counted.
        usable = bool(torch.isfinite(norm))
        if usable:
            set_learning_rate(self._optimizer, learning_rate)
            take_step(self._optimizer, self._device)
            if self._average is not None:
                self._average.step(self._parameters)
        self.skipped_in_a_row = 0 if usable else self.skipped_in_a_row + 1
        # Now and not before the next: a critic's gradients and those of the first network are never held together.
        self._optimizer.zero_grad(set_to_none=True)
        return (float(norm) if usable else 0.0), usable

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place of the trained ones for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self, *, keep: bool) -> dict[str, Any]:
        """Return weights, average and optimiser, whole on the CPU; all processes ask, those without `keep` get none."""
        average = {} if self._average is None else {"average": whole(self._average.state_dict(), keep=keep)}
        return {
            "module": whole(own_state(self.objective.module), keep=keep),
            **average,
            "optimizer": whole_state(self._optimizer, keep=keep),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, spread as the weights are; `ValueError` or `KeyError` if it is of another network."""
        load_own_state(self.objective.module, state["module"])
        if self._average is not None:
            average = placed_average(state["average"], self._parameters)
            self._average.load_state_dict(average | {"decay": self.options.ema_decay})
        load_whole_state(self._optimizer, state["optimizer"])

    @torch.no_grad()
    def _swap(self) -> None:
        if self._average is None:
            return
        forget_gathered(self.objective.module)
        # One tensor at a time, so that no third copy of the weights is needed.
        for parameter, average in zip(self._parameters, self._average.shadow_params, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
