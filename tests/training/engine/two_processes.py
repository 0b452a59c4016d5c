"""A script for `test_distributed.py`, started by torchrun: the same training over the processes, in both shardings."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from swifti2v.errors import TrainingError
from swifti2v.training.engine.distributed import joined_processes, whole
from swifti2v.training.engine.learner import own_state
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.low_res.lora import LoraOptions, LowResLoraObjective, add_lora
from swifti2v.training.low_res.lora_files import lora_state, save_lora

if TYPE_CHECKING:
    from swifti2v.training.engine.distributed import Processes, Sharding

STEPS, STOP = 10, 6


class Block(nn.Module):
    """A frozen bfloat16 layer with trained float32 ones around it, as a LoRA has them; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(7, 7).to(torch.bfloat16).requires_grad_(False)
        self.down, self.up = nn.Linear(7, 3, bias=False), nn.Linear(3, 7)
        self.table = nn.Parameter(torch.randn(1, 7))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        base = self.frozen(inputs.to(torch.bfloat16)).float()
        return inputs + torch.tanh(base + self.up(self.down(inputs)) + self.table)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(7, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=False)
        return self.head(inputs)


class Objective:
    """Two networks in a container; `merged` batches are taken as one."""

    def __init__(self, *, merged: int = 1, bad: int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.ModuleDict({"network": Network(), "text": nn.Linear(5, 7)})
        self._merged = merged
        self._bad = bad

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        numbers = range(step * self._merged, (step + 1) * self._merged)
        inputs = torch.cat([torch.randn(4, 5, generator=torch.Generator().manual_seed(number)) for number in numbers])
        predicted = self.module["network"](self.module["text"](inputs))
        loss = (predicted - inputs.sum(dim=1, keepdim=True)).square().mean()
        return loss * (float("nan") if step == self._bad else 1.0), {"samples": float(len(inputs))}


class LatentSamples:
    """Three samples for the Low-Res LoRA, one at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"latents": (16, 3, 4, 6), "condition": (20, 3, 4, 6), "prompt_embeds": (5, 32)}
        self._samples = [
            SimpleNamespace(tensors={name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
            for _ in range(3)
        ]

    def __getitem__(self, index: int) -> SimpleNamespace:
        return self._samples[index]

    def batch_of(self, step: int) -> list[int]:
        return [step % 3]


def low_res_objective() -> LowResLoraObjective:
    """A tiny expert with a LoRA, frozen in bfloat16 as on a GPU, with gradient checkpointing."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    add_lora(transformer, LoraOptions(rank=3, alpha=6.0))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    data = LatentSamples()
    return LowResLoraObjective(transformer, expert="low", samples=data, batches=data)


def options(sharding: Sharding = "shard") -> LoopOptions:
    return LoopOptions(
        num_steps=STEPS,
        learning_rate=0.02,
        warmup_steps=2,
        checkpoint_every=STEPS,
        log_every=1,
        bfloat16=False,
        sharding=sharding,
    )


def train_twice(folder: Path, processes: Processes, sharding: Sharding) -> None:
    """Train in two sittings, the second of which resumes; keep the checkpoint of the first."""
    loop = TrainingLoop(Objective(), folder, options(sharding), processes=processes)

    def stop(report) -> None:
        if report.step == STOP and processes.rank == 1:
            loop.stop()

    try:
        loop.run(on_step=stop)
    except KeyboardInterrupt:
        if processes.is_main:
            (folder / "first.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    loop = TrainingLoop(Objective(), folder, options(sharding), processes=processes)

    def save(_step: int) -> None:
        averaged = whole(own_state(loop.objective.module), keep=processes.is_main)
        if processes.is_main:
            torch.save(averaged, folder / "averaged.pt")

    loop.run(on_checkpoint=save)
    local = sum(parameter.to_local().numel() for parameter in loop.objective.module.parameters())
    (folder / f"numbers_of_rank_{processes.rank}.txt").write_text(str(local))


def train_lora(folder: Path, processes: Processes, sharding: Sharding) -> None:
    objective = low_res_objective()
    loop = TrainingLoop(objective, folder, options(sharding), processes=processes)

    def save(_step: int) -> None:
        state = lora_state(objective.module, keep=processes.is_main)
        if processes.is_main:
            save_lora(state, objective.module, folder)

    loop.run(on_checkpoint=save)


def train_and_validate(folder: Path, processes: Processes, sharding: Sharding) -> None:
    """Train with validations between the checkpoints; each is a forward of the whole network."""
    objective = Objective()
    often = replace(options(sharding), validate_every=3)
    loop = TrainingLoop(objective, folder, often, processes=processes)
    seen: dict[str, torch.Tensor] = {}

    def validate(step: int) -> dict[str, float]:
        network, text = objective.module["network"], objective.module["text"]
        with torch.no_grad():
            output = network(text(torch.ones(2, 5)))
        if step == 9:  # the last, because whoever asks for the weights makes FSDP forget what it has gathered
            average = whole(objective.module.state_dict())
            seen.update(output=output, average={name: tensor.clone() for name, tensor in average.items()})
        return {"output": float(output.mean())}

    loop.run(on_validation=validate)
    if processes.is_main:
        torch.save(seen, folder / "seen.pt")


def main(folder: Path) -> None:
    with joined_processes() as processes:
        for sharding in ("replicate", "shard"):
            train_twice(folder / sharding, processes, sharding)
            train_lora(folder / f"lora_{sharding}", processes, sharding)
            train_and_validate(folder / f"validated_{sharding}", processes, sharding)
        # The loss of one process is not finite: both have to stop.
        try:
            TrainingLoop(Objective(bad=7), folder / "bad", options(), processes=processes).run()
        except TrainingError as error:
            (folder / f"error_of_rank_{processes.rank}.txt").write_text(str(error))
        # Each has a folder of its own, and only one of them a checkpoint.
        try:
            own = folder / ("shard" if processes.is_main else "empty")
            TrainingLoop(Objective(), own, options(), processes=processes).run()
        except TrainingError as error:
            (folder / f"folders_of_rank_{processes.rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
