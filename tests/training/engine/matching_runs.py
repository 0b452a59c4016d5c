"""Distribution matching of a tiny Stage II, for tests of it and as a script: on two processes, killed and resumed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swifti2v.training.engine.distributed import joined_processes
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.refiner.distribution_matching import DistributionMatchingObjective, DistributionMatchingOptions
from swifti2v.training.refiner.windows import WindowSource, WindowSourceOptions
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS, FRAMES, SIDE = 48, 5, 4
OPTIONS = DistributionMatchingOptions(
    num_student_steps=2,
    flow=WindowSourceOptions(context_noise=0.0, prompt_dropped_share=0.0, own_context_share=0.3),
    critic_steps_per_step=2,
    critic_learning_rate=5e-3,
)
LOOP = LoopOptions(
    num_steps=8, learning_rate=2e-3, warmup_steps=2, betas=(0.0, 0.999), checkpoint_every=4, log_every=1, bfloat16=False
)
STOP = 5


@dataclass(frozen=True)
class Sample:
    """Latents, a prompt and a reference that is near."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


def make_sample(seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(CHANNELS, FRAMES, SIDE, SIDE, generator=generator)
    tensors = {
        "latents": latents,
        "prompt_embeds": torch.randn(7, 32, generator=generator),
        "reference.0": latents + 0.3 * torch.randn(latents.shape, generator=generator),
    }
    return Sample(f"clip {seed}", tensors)


SAMPLES = [make_sample(seed) for seed in range(3)]


class Steps:
    """Two samples a batch."""

    def batch_of(self, step: int) -> list[int]:
        return [step % 3, (step + 1) % 3]


def stage_two(**changes: Any) -> StageTwoTransformer:
    """The same random weights every time, that look at everything."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2 * CHANNELS,
        "out_channels": CHANNELS, "reference_channels": CHANNELS, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return StageTwoTransformer(**settings | changes)


def matching_objective(
    *,
    student: StageTwoTransformer | None = None,
    teacher: StageTwoTransformer | None = None,
    critic: StageTwoTransformer | None = None,
    options: DistributionMatchingOptions = OPTIONS,
    num_processes: int = 1,
    empty_prompt: Tensor | None = None,
) -> DistributionMatchingObjective:
    """The objective with three networks that are equal unless they are given."""
    student = student or stage_two()
    source = WindowSource(
        student,
        samples=SAMPLES,
        batches=Steps(),
        options=options.source_options,
        num_processes=num_processes,
        empty_prompt=empty_prompt,
    )
    return DistributionMatchingObjective(
        student, teacher or stage_two(), critic=critic or stage_two(), source=source, options=options
    )


def main(folder: Path) -> None:
    """Train on the processes of torchrun, in both shardings, in two sittings."""
    with joined_processes() as processes:
        for sharding in ("replicate", "shard"):
            for last in (STOP, LOOP.num_steps):
                of = matching_objective(num_processes=processes.count)
                options = replace(LOOP, sharding=sharding)
                loop = TrainingLoop(of, folder / sharding, options, processes=processes, critic=of.critic)

                def stop(report: Any, loop: TrainingLoop = loop, last: int = last) -> None:
                    if report.step == last:
                        loop.stop()

                try:
                    loop.run(on_step=stop)
                except KeyboardInterrupt:
                    continue


if __name__ == "__main__":
    main(Path(sys.argv[1]))
