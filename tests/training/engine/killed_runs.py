"""A script for `test_resume.py`: train in a child process, kill it at random steps, let another one go on.

One interpreter forks all children, so that importing torch is paid once; it starts no threads of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils import tensorboard  # noqa: F401 - so that the children do not import it one by one

from swifti2v.training.engine.loop import LoopOptions, TrainingLoop

OPTIONS = LoopOptions(
    num_steps=90, learning_rate=0.01, warmup_steps=5, checkpoint_every=5, keep_last=2, log_every=1, bfloat16=False
)
NUM_KILLS = 10


class Dropped:
    """Regression through dropout; the batch depends on its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1))

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        return (self.module(inputs) - inputs.prod(dim=1, keepdim=True)).square().mean(), {}


def train(folder: Path, *, seconds_per_step: float = 0.0) -> None:
    TrainingLoop(Dropped(), folder, OPTIONS).run(on_step=lambda _report: time.sleep(seconds_per_step))


def last_step(folder: Path) -> int:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # it is being written
        return 0


def kill_at(folder: Path, step: int, delay: float) -> None:
    child = os.fork()
    if child == 0:
        train(folder, seconds_per_step=0.01)
        os._exit(0)
    while last_step(folder) < step:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit(f"the child had ended by itself before step {step} was seen: {status}")


def main(folder: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secrets here
    train(folder / "whole")
    killed = []
    for _ in range(NUM_KILLS):
        killed.append(last_step(folder / "killed") + chance.randint(1, 6))
        kill_at(folder / "killed", killed[-1], chance.uniform(0, 0.03))
    train(folder / "killed")
    (folder / "killed_at.json").write_text(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
