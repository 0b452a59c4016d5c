"""The Low-Res LoRA of Stage I: one expert of Wan2.2-I2V-A14B learns to work at 640x352, on its own noise levels.

It is trained on the many-step base; the Few-Step LoRA is added at inference only (the advice of its makers). An expert
meets the timesteps that it has at inference: the high-noise one [boundary, 1], the low-noise one [0, boundary).
Conventions of DiffSynth-Studio's trainer: time shift 5, uniform before the shift, velocity target, bell-shaped weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig

from swifti2v.errors import ConfigurationError
from swifti2v.memory.networks import EXPERT, Network
from swifti2v.training.engine.samples import Prefetcher
from swifti2v.training.low_res.encoding import CONDITION, LATENTS, PATCH, PROMPT
from swifti2v.training.step_cost import LORA_TARGETS, TrainedNetwork, measured_flops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from swifti2v.training.engine.samples import Batches, Samples

Expert = Literal["high", "low"]
ADAPTER_NAME = "default"  # the name that diffusers' own collectors of LoRA metadata ask for
NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class LoraOptions:
    """Size and place of a LoRA.

    Args:
        rank: of the two matrices.
        alpha: the LoRA is scaled by alpha / rank.
        targets: modules of every block, by the ends of their names.
        dropout: of the LoRA's input.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            msg = f"rank {self.rank} and alpha {self.alpha} must be above 0, dropout {self.dropout} within [0, 1)"
            raise ConfigurationError(msg)


@dataclass(frozen=True)
class ExpertNoise:
    """Which noise levels an expert is trained on, and how they count.

    Args:
        boundary: sigma at which the experts take turns (0.9 for I2V-A14B).
        flow_shift: s of ``s * u / (1 + (s - 1) * u)``; u is uniform over what the expert's range is before the shift.
        weighting: `bell`: the loss counts ``exp(-2 * (sigma - 0.5) ** 2)``, divided by the mean of that over the
            expert's range; `uniform`: all levels alike.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    boundary: float = 0.9
    flow_shift: float = 5.0
    weighting: Literal["bell", "uniform"] = "bell"

    def __post_init__(self) -> None:
        if not 0 < self.boundary < 1 or not self.flow_shift > 0:
            msg = f"boundary {self.boundary} must be within (0, 1) and flow_shift {self.flow_shift} above 0"
            raise ConfigurationError(msg)

    def levels(self, expert: Expert, uniform: Tensor) -> Tensor:
        """Turn numbers uniform in [0, 1) into sigmas of the expert: (boundary, 1] of high, [0, boundary) of low."""
        edge = self.boundary / (self.flow_shift - (self.flow_shift - 1) * self.boundary)
        unshifted = 1 - uniform * (1 - edge) if expert == "high" else uniform * edge
        return self.flow_shift * unshifted / (1 + (self.flow_shift - 1) * unshifted)

    def weights(self, expert: Expert, sigmas: Tensor) -> Tensor:
        """Weights of the loss at `sigmas`, whose mean over the expert's levels is 1."""
        if self.weighting == "uniform":
            return torch.ones_like(sigmas)
        grid = self.levels(expert, (torch.arange(NUM_TIMESTEPS) + 0.5) / NUM_TIMESTEPS)
        return _bell(sigmas) / _bell(grid).mean()


def add_lora(transformer: Any, options: LoraOptions) -> None:
    """Freeze `transformer` and put a LoRA on it, float32 and trained, that changes nothing yet.

    Args:
        transformer: diffusers' `WanTransformer3DModel`.
        options: see there.

    Raises:
        ConfigurationError: a target is no module of the network.
    """
    names = [name for name, _ in transformer.named_modules()]
    for target in options.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            msg = (
                f"the LoRA target {target!r} is no module of {type(transformer).__name__}; {LoraOptions().targets} are"
            )
            raise ConfigurationError(msg)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class LowResLoraObjective:
    """Predict the velocity of noised clips; the `Objective` of one expert. The LoRA is on the transformer already.

    All latent frames count, the first too: this model gets the image in channels of its own, and denoises frame 0 as
    the others. The noise of a batch follows from seed and number.

    Args:
        transformer: with `add_lora`.
        expert: whose noise levels are drawn.
        samples: latents of `LowResEncoder`.
        batches: which of them make a batch.
        noise: see `ExpertNoise`.
        seed: of levels and noise.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        expert: Expert,
        samples: Samples,
        batches: Batches,
        noise: ExpertNoise | None = None,
        seed: int = 0,
    ) -> None:
        self.module: nn.Module = transformer
        self.expert: Expert = expert
        self._transformer = transformer
        self._samples = samples
        self._batches = batches
        self._noise = noise or ExpertNoise()
        self._seed = seed
        adapter = transformer.peft_config[ADAPTER_NAME]
        # What MFU counts: blocks that are computed again for checkpointing are not in it.
        self._trained = TrainedNetwork(
            Network.of(EXPERT, transformer.config),
            adapter.r,
            tuple(sorted(adapter.target_modules)),
            gradient_checkpointing=False,
        )
        self._prefetcher = Prefetcher(self._batch)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted mean squared error of the velocity; "error" is the same without weights."""
        batch = {name: tensor.to(self._transformer.device) for name, tensor in self._prefetcher.take(step).items()}
        clean, size = batch[LATENTS].float(), len(batch[LATENTS])
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        sigma = self._noise.levels(self.expert, torch.rand(size, generator=generator))
        weights = self._noise.weights(self.expert, sigma).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        sigma = sigma.to(clean.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        dtype = self._transformer.patch_embedding.weight.dtype
        # A tuple, since diffusers' hooks that share a sample between processes take no other output.
        (velocity,) = self._transformer(
            hidden_states=torch.cat([noisy, batch[CONDITION].float()], dim=1).to(dtype),
            # float32: in bfloat16 the timestep 833.3 would be 832.
            timestep=sigma * NUM_TIMESTEPS,
            encoder_hidden_states=batch[PROMPT].to(dtype),
            return_dict=False,
        )
        errors = (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3, 4))
        numbers = {"error": float(errors.detach().mean()), "sigma": float(sigma.mean())}
        return (errors * weights).mean(), numbers | self._amounts(batch)

    def _amounts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        size, _, frames, height, width = batch[LATENTS].shape
        tokens = frames * (height // PATCH) * (width // PATCH)
        flops = measured_flops(self._trained, (1, frames, height, width), text_tokens=batch[PROMPT].shape[1])
        return {"samples": float(size), "tokens": float(size * tokens), "tflop": size * flops.step}

    def _batch(self, step: int) -> dict[str, Tensor]:
        samples = [self._samples[index].tensors for index in self._batches.batch_of(step)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in (LATENTS, CONDITION, PROMPT)}


def _bell(sigmas: Tensor) -> Tensor:
    return torch.exp(-2 * (sigmas - 0.5).square())
