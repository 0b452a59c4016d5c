"""The loop that every recipe shares. Read `TrainingLoop.step` first: batch, loss, backward, clip, optimizer, EMA, log.

The data and noise of a batch depend on (seed, number of the batch) only, so a run that is killed and started again
continues with the same losses: the checkpoint holds the weights, their average, the optimizer and the step (and those
of the critic, where an objective has one), and nothing else has a state. Batches are numbered through over steps, turns
of a step (the critic's, then the network's own), parts of a turn (gradient accumulation) and processes; so two
processes do what one does that accumulates two batches.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from swifti2v.errors import CheckpointError, ConfigurationError, TrainingError
from swifti2v.training.engine.checkpoints import CheckpointFolder
from swifti2v.training.engine.distributed import Processes, Sharding
from swifti2v.training.engine.failures import save_failure
from swifti2v.training.engine.interruption import interruption_as_request
from swifti2v.training.engine.learner import Critic, Learner, Objective
from swifti2v.training.engine.observers import NumbersLog, Tracker, open_logs
from swifti2v.training.engine.optimizers import Optimizer, make_optimizer, set_learning_rate, take_step
from swifti2v.training.engine.throughput import AMOUNTS, peak_tflop_per_second, rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_SKIPPED_STEPS = 10
"""Steps in a row whose gradient may overflow before the run is given up."""


@dataclass(frozen=True)
class LoopOptions:
    """How long, how fast and on how many processes to train.

    Args:
        num_steps: optimizer steps of the whole run.
        optimizer: AdamW with moments in float32, or in 8 bits (`swifti2v.training.engine.optimizers`).
        learning_rate: peak; linear warm-up over `warmup_steps`, cosine to `final_rate_share` of it at the end.
        betas: of AdamW.
        gradient_clip: largest norm of the gradient.
        gradient_accumulation: batches per process and step.
        ema_decay: of the averaged weights, which are the result.
        checkpoint_every: steps between checkpoints; the newest `keep_last` and every `keep_every`-th step are kept.
        validate_every: steps between validations; 0: none.
        bfloat16: multiply matrices in bfloat16 with float32 master weights, where the device has units for that (on a
            CPU: AMX; elsewhere it would be a hundred times slower, and float32 is used).
        sharding: of the weights over several processes; see `swifti2v.training.engine.distributed`.
        context_parallel: processes that share a sample, each with a part of its tokens; their number must divide that
            of all. They see the same batches and the same noise.
        trackers: where the numbers go besides ``log.jsonl`` and TensorBoard.
        max_seconds: stop (with a checkpoint) after this much wall time; the schedule still counts `num_steps`.
        seed: of what networks draw themselves (dropout); data and noise have the seed of the objective.
    """

    num_steps: int
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 100
    final_rate_share: float = 0.05
    gradient_clip: float = 1.0
    gradient_accumulation: int = 1
    ema_decay: float = 0.998
    checkpoint_every: int = 200
    keep_last: int = 1
    keep_every: int = 0
    validate_every: int = 0
    log_every: int = 20
    max_seconds: float = math.inf
    bfloat16: bool = True
    sharding: Sharding = "shard"
    context_parallel: int = 1
    trackers: tuple[Tracker, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation", "checkpoint_every", "keep_last", "log_every", "context_parallel"):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1"
                raise ConfigurationError(msg)

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows step number `step` (from 1)."""
        return self.validate_every > 0 and step % self.validate_every == 0


@dataclass(frozen=True)
class StepReport:
    """A finished step: its number from 1, of how many, its numbers in this process, and how long it took."""

    step: int
    num_steps: int
    numbers: Mapping[str, float]
    seconds: float


class TrainingLoop:
    """Run an objective; see the module for what makes a resumed run equal.

    Args:
        objective: its module is moved to the device of `processes` and sharded over them.
        directory: of the run, the same for all processes.
        processes: of `joined_processes`; by default this one alone, on the CPU.
        critic: a second network that the objective asks; its numbers are logged as ``critic_NAME``.

    Attributes:
        steps_done: optimizer steps that have been taken, those of earlier runs included.
    """

    def __init__(
        self,
        objective: Objective,
        directory: Path,
        options: LoopOptions,
        *,
        processes: Processes | None = None,
        critic: Critic | None = None,
    ) -> None:
        self.objective = objective
        self.directory = directory
        self.options = options
        self.steps_done = 0
        self.processes = processes or Processes()
        if options.context_parallel != self.processes.context:
            msg = f"context_parallel is {options.context_parallel}, but this training shares no samples; set it to 1"
            raise ConfigurationError(msg)
        self._learner = self._learner_of(objective, options.learning_rate, options.betas, options.ema_decay)
        self._critic: Learner | None = None
        self._turns: tuple[Learner, ...] = (self._learner,)
        if critic is not None:
            self._critic = self._learner_of(critic.objective, critic.learning_rate, critic.betas, None)
            self._turns = (*[self._critic] * critic.steps_per_step, self._learner)
        self._checkpoints = CheckpointFolder(directory, options.keep_last, options.keep_every)
        self._since_log: Counter[str] = Counter()
        self._stopping = False
        device = self.processes.device.type
        self._autocast = options.bfloat16 and (device != "cpu" or torch.cpu._is_amx_tile_supported())

    def step(self) -> StepReport:
        """Take one optimizer step: each turn of the critic, if there is one, then the network's own.

        Raises:
            TrainingError: the loss, or the gradients of too many steps in a row, are not finite.
        """
        options, processes, started = self.options, self.processes, time.monotonic()
        parts, numbers = options.gradient_accumulation, Counter[str]()
        for turn, learner in enumerate(self._turns):
            own: Counter[str] = Counter()
            for part in range(parts):
                # Batch and loss.
                number = (self.steps_done * len(self._turns) + turn) * parts + part
                draw = number * processes.batch_count + processes.batch_rank
                torch.manual_seed(options.seed * 1_000_003 + draw)
                with self._precision():
                    loss, found = learner.objective.loss(draw)
                value = float(loss.detach())
                if processes.any(not math.isfinite(value)):
                    self._give_up(learner, draw, value)
                # Backward: gradients are averaged over all processes; those that share a sample hold parts of one sum.
                (loss * processes.context / parts).backward()  # type: ignore[no-untyped-call]
                found = {"loss": value} | found
                own.update({name: each if name in AMOUNTS else each / parts for name, each in found.items()})

            # Clip.
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters, options.gradient_clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

            # Optimizer and EMA. bfloat16 can overflow in one gradient of thousands of steps: that step is left out.
            usable = bool(torch.isfinite(norm))
            if usable:
                set_learning_rate(learner.optimizer, self.learning_rate_at(self.steps_done, peak=learner.learning_rate))
                take_step(learner.optimizer, processes.device)
                if learner.average is not None:
                    learner.average.step(learner.parameters)
            # Now, not before the next turn: gradients of the critic and of the network are never held together.
            learner.optimizer.zero_grad(set_to_none=True)
            self._count_skipped(learner, usable=usable)

            # Log.
            own.update({"gradient_norm": float(norm) if usable else 0.0, "skipped": float(not usable)})
            if learner is self._critic:
                own = Counter({f"critic_{name}": each / (len(self._turns) - 1) for name, each in own.items()})
            numbers.update(own)
        self.steps_done += 1
        seconds = time.monotonic() - started
        self._since_log.update(numbers)
        self._since_log.update({"step_seconds": seconds, "steps": 1})
        return StepReport(self.steps_done, options.num_steps, dict(numbers), seconds)

    def run(
        self,
        *,
        on_step: Callable[[StepReport], None] | None = None,
        on_validation: Callable[[int], Mapping[str, float]] | None = None,
        on_checkpoint: Callable[[int], None] | None = None,
    ) -> None:
        """Train from the last checkpoint in `directory`, or from the start, to the end.

        Args:
            on_step: called after every step.
            on_validation: called every `validate_every` steps with the averaged weights in place, in the precision of
                the steps; its numbers, averaged over the processes, are logged as ``validation/NAME``.
            on_checkpoint: called after every checkpoint with the averaged weights in place. These two are called in
                every process, so that they can put sharded weights together.

        Raises:
            TrainingError: a loss, or too many gradients in a row, are not finite; processes see different checkpoints.
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint has been written.
            CheckpointError: the checkpoint in `directory` is damaged or of another network.
            OutputError: a checkpoint cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._resume()
        options, started, saved_step = self.options, time.monotonic(), None
        is_main = self.processes.is_main
        logs = open_logs(self.directory, options.trackers, resumed_step=self.steps_done) if is_main else []
        try:
            with interruption_as_request(self.stop):
                while self.steps_done < options.num_steps and not self._should_stop(started):
                    report = self.step()
                    if on_step is not None:
                        on_step(report)
                    if report.step % options.log_every == 0:
                        self._log(logs, started)
                    if on_validation is not None and options.validates_after(report.step):
                        self._validate(logs, on_validation)
                    if report.step % options.checkpoint_every == 0:
                        self._checkpoint(on_checkpoint)
                        saved_step = report.step
                if saved_step != self.steps_done:
                    self._checkpoint(on_checkpoint)
        finally:
            for log in logs:
                log.close()
        if self._stopping and self.steps_done < options.num_steps:
            msg = f"stopped after step {self.steps_done}; start it again to go on"
            raise KeyboardInterrupt(msg)

    def stop(self) -> None:
        """Ask the run to stop after the step that is under way, with a checkpoint; from a callback or a thread."""
        self._stopping = True

    def learning_rate_at(self, step: int, *, peak: float | None = None) -> float:
        """Learning rate of optimizer step `step` (from 0): the network's, or one with another `peak`."""
        options, peak = self.options, self.options.learning_rate if peak is None else peak
        if step < options.warmup_steps:
            return peak * (step + 1) / options.warmup_steps
        progress = min(1.0, (step - options.warmup_steps) / max(1, options.num_steps - options.warmup_steps))
        floor = options.final_rate_share
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def _learner_of(
        self, objective: Objective, learning_rate: float, betas: tuple[float, float], ema_decay: float | None
    ) -> Learner:
        options = self.options
        self.processes.distribute(objective.module, options.sharding)
        make = partial(
            make_optimizer,
            options.optimizer,
            learning_rate=learning_rate,
            weight_decay=options.weight_decay,
            betas=betas,
        )
        return Learner(objective, make, learning_rate=learning_rate, ema_decay=ema_decay)

    def _should_stop(self, started: float) -> bool:
        self._stopping = self.processes.any(self._stopping)
        return self._stopping or self.processes.any(time.monotonic() - started >= self.options.max_seconds)

    def _precision(self) -> torch.autocast:
        device = self.processes.device.type
        # A weight is used once in a pass: cached casts would save nothing, and keep what sharding frees.
        return torch.autocast(device, torch.bfloat16, enabled=self._autocast, cache_enabled=False)

    def _count_skipped(self, learner: Learner, *, usable: bool) -> None:
        learner.skipped_in_a_row = 0 if usable else learner.skipped_in_a_row + 1
        if learner.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            msg = (
                f"the gradients of {MAX_SKIPPED_STEPS} steps up to {self.steps_done} are not finite; "
                "lower the learning rate or set bfloat16: false"
            )
            raise TrainingError(msg)

    def _give_up(self, learner: Learner, draw: int, value: float) -> None:
        step = self.steps_done
        if math.isfinite(value):
            msg = f"the loss of step {step} is not finite in another process; its message names the batch"
            raise TrainingError(msg)
        path = self.directory / f"failed_step_{step:06d}_rank_{self.processes.rank}.pt"
        save_failure(path, step=step, draw=draw, seed=self.options.seed, loss=value, inputs=learner.inputs.inputs)
        msg = f"the loss of step {step} is {value}; its batch is in {path}: look at it, or lower the learning rate"
        raise TrainingError(msg)

    def _log(self, logs: list[NumbersLog], started: float) -> None:
        everyone = self.processes.gather(dict(self._since_log))
        self._since_log.clear()
        steps, seconds = everyone[0].pop("steps"), everyone[0].pop("step_seconds")
        totals: Counter[str] = Counter()
        for numbers in everyone:
            totals.update({name: value for name, value in numbers.items() if name in everyone[0]})
        amounts = {name: totals.pop(name) / self.processes.context for name in AMOUNTS if name in totals}
        means = {name: value / steps / len(everyone) for name, value in totals.items()}
        peak = peak_tflop_per_second(self.processes.device)
        speed = rates(amounts, seconds=seconds, peak=peak * len(everyone) if peak else None)
        rate = {"learning_rate": self.learning_rate_at(self.steps_done - 1), "seconds": time.monotonic() - started}
        for log in logs:
            log.write(self.steps_done, means | rate | speed)

    def _validate(self, logs: list[NumbersLog], on_validation: Callable[[int], Mapping[str, float]]) -> None:
        with self._learner.averaged(), self._precision():
            found = dict(on_validation(self.steps_done))
        everyone = self.processes.gather(found)
        means = {f"validation/{name}": sum(each[name] for each in everyone) / len(everyone) for name in found}
        for log in logs:
            log.write(self.steps_done, means)

    def _checkpoint(self, on_checkpoint: Callable[[int], None] | None) -> None:
        keep = self.processes.is_main
        state = {
            "step": self.steps_done,
            **self._learner.state(keep=keep),
            "window": self.processes.gather(dict(self._since_log)),
        }
        if self._critic is not None:
            state["critic"] = self._critic.state(keep=keep)
        if keep:
            self._checkpoints.save(state)
        del state
        self.processes.wait()  # nobody goes on, and perhaps resumes, before the file is there
        if on_checkpoint is not None:
            with self._learner.averaged():
                on_checkpoint(self.steps_done)
            self.processes.wait()  # here, and not in a step: other groups of processes have shorter limits

    def _resume(self) -> None:
        state = self._checkpoints.load()
        steps = self.processes.gather(0 if state is None else state["step"])
        if len(set(steps)) > 1:
            msg = f"the processes would go on from the steps {steps}; give all of them the same folder"
            raise TrainingError(msg)
        if state is None:
            return
        try:
            self._load(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            msg = (
                f"{self._checkpoints.newest} is of another network or recipe ({str(error).splitlines()[0]}); "
                "resume with the recipe that wrote it, or train in a new folder"
            )
            raise CheckpointError(msg) from error

    def _load(self, state: dict[str, Any]) -> None:
        if self._critic is None and "critic" in state:
            msg = "it has a critic"
            raise ValueError(msg)
        self._learner.load(state)
        if self._critic is not None:
            self._critic.load(state["critic"])
        windows = state.get("window", [])
        self._since_log = Counter(windows[self.processes.rank] if len(windows) == self.processes.count else {})
        self.steps_done = state["step"]
