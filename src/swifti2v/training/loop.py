"""The loop that every recipe shares: steps, EMA, log, atomic checkpoints, exact resume.

A step's data and noise depend on (seed, step) only, so a run that is killed and started again continues with the same
losses: the checkpoint holds the weights, their average, the optimiser and the step, and nothing else has a state.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from diffusers.training_utils import EMAModel

from swifti2v.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

Batch = TypeVar("Batch")

CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train.

    Args:
        num_steps: optimiser steps of the whole run.
        learning_rate: peak; linear warm-up over `warmup_steps`, cosine to a twentieth at the end.
        gradient_clip: largest norm of the gradient.
        ema_decay: of the averaged weights, which are the result.
        checkpoint_every: steps between checkpoints.
        bfloat16: multiply matrices in bfloat16, where the CPU has units for that (AMX); elsewhere it would be a hundred
            times slower, and float32 is used.
        max_seconds: stop (with a checkpoint) after this much wall time; the schedule still counts `num_steps`.
    """

    num_steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    ema_decay: float = 0.998
    checkpoint_every: int = 200
    log_every: int = 20
    max_seconds: float = math.inf
    bfloat16: bool = True


class Objective(Protocol):
    """What a recipe trains: a module holding every trained weight, and the loss of a step."""

    module: nn.Module

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise and numbers for the log; a function of the weights and `step` only."""
        ...


class Prefetcher(Generic[Batch]):
    """Make the batch of the next step in a thread while this one trains; a batch depends on its step only."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: dict[int, Future[Batch]] = {}

    def take(self, step: int) -> Batch:
        """Return the batch of `step` and begin that of the next."""
        current = self._pending.pop(step, None)
        self._pending = {step + 1: self._executor.submit(self._make, step + 1)}
        return current.result() if current is not None else self._make(step)


class TrainingLoop:
    """Run an objective; see the module for what makes a resumed run equal."""

    def __init__(self, objective: Objective, directory: Path, options: LoopOptions) -> None:
        self.objective = objective
        self.directory = directory
        self.options = options
        self.step = 0
        self._parameters = [p for p in objective.module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.98)
        )
        self._average = EMAModel(self._parameters, decay=options.ema_decay)
        self._autocast = options.bfloat16 and torch.cpu._is_amx_tile_supported()

    def run(self, *, on_checkpoint: Callable[[int], None] | None = None) -> None:
        """Train from the last checkpoint in `directory`, or from the start, to the end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        started = time.monotonic()
        totals: dict[str, float] = {}
        while self.step < self.options.num_steps and time.monotonic() - started < self.options.max_seconds:
            for name, value in self._train_step().items():
                totals[name] = totals.get(name, 0.0) + value
            if self.step % self.options.log_every == 0:
                self._log({name: value / self.options.log_every for name, value in totals.items()}, started)
                totals = {}
            if self.step % self.options.checkpoint_every == 0:
                self._checkpoint(on_checkpoint)
        self._checkpoint(on_checkpoint)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (from 0)."""
        options = self.options
        if step < options.warmup_steps:
            return options.learning_rate * (step + 1) / options.warmup_steps
        progress = min(1.0, (step - options.warmup_steps) / max(1, options.num_steps - options.warmup_steps))
        return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _train_step(self) -> dict[str, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._autocast):
            loss, numbers = self.objective.loss(self.step)
        if not torch.isfinite(loss):
            msg = f"the loss of step {self.step} is {loss.item()}; lower the learning rate and resume {self.directory}"
            raise CheckpointError(msg)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.options.gradient_clip)
        # bfloat16 can overflow in one gradient of thousands of steps; that step is left out and counted.
        usable = bool(torch.isfinite(norm))
        if usable:
            self._optimizer.step()
            self._average.step(self._parameters)
        self.step += 1
        health = {"gradient_norm": float(norm) if usable else 0.0, "skipped": float(not usable)}
        return {"loss": float(loss.detach())} | health | numbers

    def _log(self, numbers: dict[str, float], started: float) -> None:
        entry = {"step": self.step, "seconds": round(time.monotonic() - started, 1)}
        entry |= {name: round(value, 5) for name, value in numbers.items()}
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _checkpoint(self, on_checkpoint: Callable[[int], None] | None) -> None:
        state = {
            "step": self.step,
            "module": self.objective.module.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        partial = self.directory / f".{CHECKPOINT_NAME}.part"
        torch.save(state, partial)
        partial.replace(self.directory / CHECKPOINT_NAME)
        if on_checkpoint is not None:
            self._average.store(self._parameters)
            self._average.copy_to(self._parameters)
            try:
                on_checkpoint(self.step)
            finally:
                self._average.restore(self._parameters)

    def _resume(self) -> None:
        path = self.directory / CHECKPOINT_NAME
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.objective.module.load_state_dict(state["module"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
