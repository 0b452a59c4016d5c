"""A script for `test_context_parallel.py`, started by torchrun: processes that share each sample by twos."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel

from swifti2v.training.engine.distributed import Processes, joined_processes, whole
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.low_res.lora import LoraOptions, LowResLoraObjective, add_lora
from swifti2v.training.refiner.segment_flow import SegmentFlowObjective, SegmentFlowOptions
from swifti2v.wan.transformer import StageTwoTransformer

STEPS = 2
KINDS = ("replicate", "checkpointed", "bfloat16", "lora")
GROUPS = "groups"
"""A kind of training whose steps have two batches: for two groups, or for one process that takes them in turn."""
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
    "rope_max_seq_len": 32,
}  # fmt: skip


class Latents:
    """Four clips for both stages, two at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {
            "latents": (8, 5, 4, 6), "reference.0": (8, 5, 4, 6), "condition": (12, 5, 4, 6), "prompt_embeds": (5, 16),
        }  # fmt: skip
        self._samples = [
            SimpleNamespace(
                name=str(number),
                tensors={name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
            )
            for number in range(4)
        ]

    def __getitem__(self, index: int) -> SimpleNamespace:
        return self._samples[index]

    def batch_of(self, step: int) -> list[int]:
        return [step % 4, (step + 1) % 4]


def stage_two(kind: str) -> SegmentFlowObjective:
    torch.manual_seed(0)
    transformer = StageTwoTransformer(in_channels=16, out_channels=8, reference_channels=8, **SIZES)
    torch.nn.init.normal_(transformer.frame_kind_table)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    if kind == "checkpointed":
        transformer.enable_gradient_checkpointing()
    if kind == "bfloat16":
        for block in transformer.blocks:  # as autocast does it on GPUs
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.register_forward_pre_hook(lambda _norm, inputs: (inputs[0].float(),))
    data = Latents()
    options = SegmentFlowOptions(own_context_share=0.5)
    num_batches = 2 if kind == GROUPS else 1
    return SegmentFlowObjective(
        transformer.train(), samples=data, batches=data, options=options, num_processes=num_batches
    )


def stage_one() -> LowResLoraObjective:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(in_channels=20, out_channels=8, **SIZES)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    add_lora(transformer, LoraOptions(rank=3, alpha=6.0))
    data = Latents()
    return LowResLoraObjective(transformer.train(), expert="low", samples=data, batches=data)


def train(kind: str, folder: Path, processes: Processes) -> None:
    """Leave the gradients of every step in ``gradients.pt``, beside log and checkpoint."""
    options = LoopOptions(
        num_steps=STEPS,
        learning_rate=0.01,
        warmup_steps=1,
        checkpoint_every=STEPS,
        log_every=1,
        gradient_clip=1e6,
        gradient_accumulation=2 // processes.batch_count if kind == GROUPS else 1,
        bfloat16=False,
        sharding="replicate" if kind == "replicate" else "shard",
        context_parallel=processes.context,
    )
    objective = stage_one() if kind == "lora" else stage_two(kind)
    loop = TrainingLoop(objective, folder, options, processes=processes)
    loop._autocast = kind == "bfloat16"  # which the option leaves off on CPUs that are slow at it
    gradients = []

    def keep(*_: object) -> None:
        named = objective.module.named_parameters()
        gradients.append(whole({name: each.grad for name, each in named if each.grad is not None}))

    loop._learner.optimizer.register_step_pre_hook(keep)
    loop.run()
    if processes.is_main:
        torch.save(gradients, folder / "gradients.pt")


def main(folder: Path, *kinds: str) -> None:
    # diffusers numbers the devices of the accelerator, and a machine without one has none.
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: torch.device("cpu")
    with joined_processes(context_parallel=2) as processes:
        for kind in kinds:
            train(kind, folder / kind, processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
