"""A script for `test_resume.py`: train in a child process, kill it at random moments, let another one go on.

One interpreter forks all children, so that importing torch is paid once; it starts no threads of its own. The moments
are counted in what a run does (steps, then files that are opened, renamed, ...) and not in seconds, so that no machine
is too slow or too fast for them: in the middle of a checkpoint, of a line of the log, between two steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import tensorboard  # noqa: F401 - so that the children do not import it one by one

from swifti2v.training.engine.learner import Critic
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop

OPTIONS = LoopOptions(
    num_steps=150, learning_rate=0.01, warmup_steps=5, checkpoint_every=5, keep_last=2, log_every=1, bfloat16=False
)
NUM_KILLS = 10
MOST_STEPS, MOST_EVENTS = 4, 8
"""From the last step to the one at which a child is armed, and from there to its end; a step has an event at least."""


class Dropped:
    """Regression through dropout; the batch depends on its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1))

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        return (self.module(inputs) - inputs.prod(dim=1, keepdim=True)).square().mean(), {}


class Followed(Dropped):
    """The same, held against what a second network makes of it, which learns to tell what the first one says."""

    def __init__(self) -> None:
        super().__init__()
        self.second = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))

    @property
    def critic(self) -> Critic:
        return Critic(Follower(self), steps_per_step=2, learning_rate=0.02, betas=(0.0, 0.999))

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss, numbers = super().loss(step)
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            expected = self.second(inputs)
        return loss + 0.1 * (self.module(inputs) - expected).square().mean(), numbers


class Follower:
    """The second network's objective."""

    def __init__(self, followed: Followed) -> None:
        self.module = followed.second
        self._followed = followed

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            said = self._followed.module(inputs)
        return (self.module(inputs) - said).square().mean(), {}


def loop_of(kind: str, folder: Path) -> TrainingLoop:
    """A fresh run of a kind: `alone`, or `followed` by a critic."""
    if kind == "alone":
        return TrainingLoop(Dropped(), folder, OPTIONS)
    objective = Followed()
    return TrainingLoop(objective, folder, OPTIONS, critic=objective.critic)


class Killer:
    """Kills its own process a number of file events after a step, as the kernel would: nothing is cleaned up."""

    def __init__(self, step: int, num_events: int) -> None:
        self._step = step
        self._left = num_events
        self._is_armed = False
        sys.addaudithook(self._count)

    def watch(self, report: Any) -> None:
        self._is_armed |= report.step == self._step

    def _count(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if self._is_armed and event.startswith(("open", "os.")):
            self._left -= 1
            if self._left < 0:
                self._is_armed = False  # killing is an event too
                os.kill(os.getpid(), signal.SIGKILL)


def last_step(folder: Path) -> int:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # the last line is torn
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def killed_at(kind: str, folder: Path, step: int, num_events: int) -> None:
    child = os.fork()
    if child == 0:
        killer = Killer(step, num_events)
        loop_of(kind, folder).run(on_step=killer.watch)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit(f"the child was not killed after step {step}: {status}")


def main(folder: Path, seed: int, kind: str) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secrets here
    loop_of(kind, folder / "whole").run()
    killed = []
    for _ in range(NUM_KILLS):
        killed.append(last_step(folder / "killed") + chance.randint(1, MOST_STEPS))
        killed_at(kind, folder / "killed", killed[-1], chance.randint(0, MOST_EVENTS))
    loop_of(kind, folder / "killed").run()
    (folder / "killed_at.json").write_text(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
