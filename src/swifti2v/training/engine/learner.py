"""A network that is trained, with what changes while it is: weights, optimizer, and the average of the weights (EMA).

A run has one learner, or two: a `Critic` is a second network that the objective of the first asks, and that follows it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.training_utils import EMAModel

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.distributed import forget_gathered, placed_like, whole
from swifti2v.training.engine.failures import InputRecorder
from swifti2v.training.engine.optimizers import load_whole_state, whole_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn


class Objective(Protocol):
    """What a recipe trains: a module that holds every trained weight, and the loss of a batch."""

    module: nn.Module

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimize and numbers for the log; a function of the weights and `step` only.

        `step` is the number of the batch: that of the step in one process without accumulation. Numbers named
        "samples", "tokens" and "tflop" are amounts of work (`throughput.AMOUNTS`); others are averaged.
        """
        ...


@dataclass(frozen=True)
class Critic:
    """A second network, trained by an objective of its own before every step of the first (two time scales).

    It is moved, sharded, clipped, checkpointed and resumed as the first is, and has no average: nobody keeps it.

    Args:
        objective: of the critic; none of its numbers is an amount of work.
        steps_per_step: its optimizer steps before each of the first network's.
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


class Learner:
    """An objective's network, its optimizer and its average; `TrainingLoop.step` changes them.

    Args:
        objective: its module is already on its device and sharded (`Processes.distribute`).
        make_optimizer: for the parameters that are not frozen.
        learning_rate: peak.
        ema_decay: of the average; None: no average is held.

    Attributes:
        parameters: those that are not frozen, float32.
        average: diffusers' `EMAModel`, or None.
        inputs: what its networks were last called with.
        skipped_in_a_row: steps whose gradient was not finite, up to now.

    Raises:
        ConfigurationError: nothing is trained, or a trained weight is not float32.
    """

    def __init__(
        self,
        objective: Objective,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        learning_rate: float,
        ema_decay: float | None,
    ) -> None:
        self.objective = objective
        self.learning_rate = learning_rate
        self.inputs = InputRecorder(objective.module)
        self.skipped_in_a_row = 0
        self.parameters = _trained_parameters(objective.module)
        self.optimizer = make_optimizer(self.parameters)
        self.average = None if ema_decay is None else EMAModel(self.parameters, decay=ema_decay)
        self._ema_decay = ema_decay

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place of the trained ones for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self, *, keep: bool) -> dict[str, Any]:
        """Return weights, average and optimizer, whole on the CPU; all processes ask, those without `keep` get none."""
        average = {} if self.average is None else {"average": whole(self.average.state_dict(), keep=keep)}
        return {
            "module": whole(own_state(self.objective.module), keep=keep),
            **average,
            "optimizer": whole_state(self.optimizer, keep=keep),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, sharded as the weights are; `ValueError` or `KeyError` if it is of another network."""
        _load_own_state(self.objective.module, state["module"])
        if self.average is not None:
            pairs = zip(self.parameters, state["average"]["shadow_params"], strict=True)
            shadow = [placed_like(parameter, tensor) for parameter, tensor in pairs]
            self.average.load_state_dict(state["average"] | {"shadow_params": shadow, "decay": self._ema_decay})
        load_whole_state(self.optimizer, state["optimizer"])

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average is None:
            return
        forget_gathered(self.objective.module)
        # One tensor at a time, so that no third copy of the weights is needed.
        for parameter, average in zip(self.parameters, self.average.shadow_params, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers by name; frozen parameters come from where they came from."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def _load_own_state(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into `module`, wherever its own are; raise `ValueError` unless names and shapes match."""
    current = module.state_dict()
    if unknown := sorted(saved.keys() - current.keys()) or sorted(own_state(module).keys() - saved.keys()):
        msg = f"{len(unknown)} of its weights do not match, {unknown[0]} for one"
        raise ValueError(msg)
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape:
            msg = f"{name} is {list(tensor.shape)} in it, {list(current[name].shape)} here"
            raise ValueError(msg)
        current[name].copy_(placed_like(current[name], tensor))


def _trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            msg = f"the trained {name} is {parameter.dtype}; load it in float32, the option bfloat16 does the rest"
            raise ConfigurationError(msg)
    if not named:
        msg = "nothing is trained: every parameter is frozen; unfreeze a part or add a LoRA"
        raise ConfigurationError(msg)
    return list(named.values())
