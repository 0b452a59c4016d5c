"""A script for `test_optimizers.py`, started by torchrun: sharded weights with moments in 8 bits, stopped or not."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from swifti2v.training.engine.distributed import Processes, joined_processes
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop

OPTIONS = LoopOptions(
    num_steps=6,
    optimizer="adamw8bit",
    learning_rate=0.01,
    warmup_steps=2,
    checkpoint_every=6,
    log_every=1,
    bfloat16=False,
)
STOP = 4


class Network(nn.Module):
    """Rows that divide into blocks (33 of them, one more in the first process), rows that do not, one row."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(256, 33), nn.Linear(33, 160)
        self.table = nn.Parameter(torch.zeros(1, 160 * 32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        shift = self.table.view(160, 32).mean(dim=1)
        return self.up(torch.tanh(self.down(inputs))) + shift


class Objective:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Network()

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = torch.randn(16, 256, generator=torch.Generator().manual_seed(step))
        return (self.module(inputs) - inputs[:, :160] - 1).square().mean(), {}


def train_and_resume(folder: Path, processes: Processes) -> None:
    """Train at once into ``whole``, and in two sittings into ``parts``."""
    TrainingLoop(Objective(), folder / "whole", OPTIONS, processes=processes).run()
    loop = TrainingLoop(Objective(), folder / "parts", OPTIONS, processes=processes)
    with suppress(KeyboardInterrupt):
        loop.run(on_step=lambda report: loop.stop() if report.step == STOP else None)
    if processes.is_main:
        (folder / "stopped.pt").write_bytes((folder / "parts" / "checkpoint.pt").read_bytes())
    TrainingLoop(Objective(), folder / "parts", OPTIONS, processes=processes).run()


if __name__ == "__main__":
    with joined_processes() as joined:
        train_and_resume(Path(sys.argv[1]), joined)
