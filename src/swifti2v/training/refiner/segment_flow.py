"""Stage II's objective at any size: restore the targets of random windows from noise, given anchor, neighbours, z_ref.

Flow matching on the targets only (paper, CSG): a velocity network minimises ``|v - (noise - x0)|^2``, one that predicts
the residual to the reference ``|x0 - truth|^2``. Samples are latents of a cache (`encoding.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from swifti2v.errors import ConfigurationError, LatentCacheError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.training.refiner.window_batches import (
    ClipBatch,
    WindowBatch,
    earlier_segments,
    noise_like,
    predicted,
    with_own_context,
)
from swifti2v.training.refiner.windows import WindowOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swifti2v.models.transformer import StageTwoTransformer

LATENTS, PROMPT, REFERENCE = "latents", "prompt_embeds", "reference."


class Sample(Protocol):
    """What is asked of a sample; `data.latent_cache.CachedSample` is one."""

    @property
    def name(self) -> str:
        """Of the clip, for messages."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """`latents` [C,T,h,w], `prompt_embeds` [L,D], and ``reference.0``, ``reference.1``, ... [C,T,h,w]."""


class Samples(Protocol):
    """Latents by index; `data.latent_cache.LatentCache` is one."""

    def __getitem__(self, index: int) -> Sample:
        """Return a sample."""


class Batches(Protocol):
    """Which samples make the batch of a step: a function of the step; `data.batches.BucketBatches` is one."""

    def batch_of(self, step: int) -> Sequence[int]:
        """Return indices of samples of one shape."""


@dataclass(frozen=True)
class SegmentFlowOptions:
    """How Stage II is trained.

    Args:
        windows: which windows are drawn.
        flow_shift: time shift of the noise levels, as at inference.
        pure_noise_share: share of samples at sigma 1, where sampling begins.
        context_noise: largest deviation of the noise on finished neighbours.
        own_context_share: share of windows whose finished neighbour is the network's own output of the segment before,
            made without gradient (exposure bias).
        own_context_steps: sampling steps of each of those segments; a step costs a forward.
        own_context_segments: most segments that the network makes one after the other before a window; how many is
            drawn from 1 to this. Clips have to be long enough for the most.
        keep_reference_above: below this noise level the reference is left out in half of the samples, so that details
            come from the image rather than from the artefacts of the reference (HunyuanVideo-1.5's super-resolution
            drops its condition below 0.7); 0 keeps it always.
        prompt_dropped_share: share of samples with an empty prompt (zeros), for guidance.
        seed: of everything drawn.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    windows: WindowOptions = field(default_factory=WindowOptions)
    flow_shift: float = 5.0
    pure_noise_share: float = 0.1
    context_noise: float = 0.05
    own_context_share: float = 0.0
    own_context_steps: int = 1
    own_context_segments: int = 1
    keep_reference_above: float = 0.0
    prompt_dropped_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pure_noise_share", "own_context_share", "keep_reference_above", "prompt_dropped_share"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name} is {getattr(self, name)}; it must be within 0..1"
                raise ConfigurationError(msg)
        if self.flow_shift <= 0 or self.context_noise < 0:
            msg = f"flow_shift is {self.flow_shift}, context_noise {self.context_noise}; use above 0 and at least 0"
            raise ConfigurationError(msg)
        if min(self.own_context_steps, self.own_context_segments) < 1:
            msg = "own_context_steps and own_context_segments must be at least 1"
            raise ConfigurationError(msg)


class WindowSource:
    """Draws the windows of a step from a cache: a function of the weights (own context), the options and the step.

    Args:
        transformer: whose own output serves as context, if `own_context_share` asks for it.
        samples: latents.
        batches: which of them make a batch.
        options: see there.
        num_processes: that train together and count their steps in turn; all of them make their own context at the same
            time, because each forward of a sharded network is a meeting of all processes.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        samples: Samples,
        batches: Batches,
        options: SegmentFlowOptions,
        num_processes: int = 1,
    ) -> None:
        self.options = options
        self._num_processes = num_processes
        self._transformer: StageTwoTransformer = transformer  # type: ignore[assignment]
        self._samples = samples
        self._batches = batches

    def generator(self, step: int) -> torch.Generator:
        """Return the source of a step's noise."""
        return torch.Generator("cpu").manual_seed(self.options.seed * 1_000_003 + step)

    def batch(self, step: int, generator: torch.Generator) -> WindowBatch:
        """Return the windows of a step on the transformer's device, float32."""
        device = next(self._transformer.parameters()).device
        rng = np.random.default_rng([self.options.seed, step])
        chosen = [self._samples[index] for index in self._batches.batch_of(step)]
        truth = torch.stack([_tensor(sample, LATENTS) for sample in chosen]).to(device, torch.float32)
        reference = torch.stack([_drawn_reference(sample, rng) for sample in chosen]).to(device, torch.float32)
        prompts = torch.stack([_tensor(sample, PROMPT) for sample in chosen]).to(device, torch.float32)
        dropped = torch.rand(len(chosen), generator=generator) < self.options.prompt_dropped_share
        prompts[dropped.to(device)] = 0
        own, windows = self._own_segments(step), self.options.windows
        segment = windows.draw(rng, truth.shape[2], segments_before=own)
        return with_own_context(
            self._transformer,
            ClipBatch(truth, reference, prompts),
            segment,
            earlier=earlier_segments(segment, segment_size=windows.segment_size, count=own),
            sigmas=shifted_sigmas(self.options.own_context_steps, shift=self.options.flow_shift),
            context_noise=self.options.context_noise,
            generator=generator,
        )

    def _own_segments(self, step: int) -> int:
        """Return how many segments the network makes itself in this step: the same in every process."""
        shared = np.random.default_rng([self.options.seed, step // self._num_processes, 1])
        if shared.random() >= self.options.own_context_share:
            return 0
        return int(shared.integers(self.options.own_context_segments)) + 1


class SegmentFlowObjective:
    """Restore the targets of random windows; the `Objective` of Stage II at any size.

    Args:
        transformer: a `StageTwoTransformer`; what of it is trained is what requires a gradient (all, or its LoRA).
        samples, batches, options, num_processes: see `WindowSource`.
    """

    def __init__(
        self,
        transformer: StageTwoTransformer,
        *,
        samples: Samples,
        batches: Batches,
        options: SegmentFlowOptions,
        num_processes: int = 1,
    ) -> None:
        self.module: nn.Module = transformer
        self.options = options
        self._transformer = transformer
        self._source = WindowSource(
            transformer, samples=samples, batches=batches, options=options, num_processes=num_processes
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a step and, for the log, the error of x0 beside that of the reference."""
        generator = self._source.generator(step)
        batch = self._source.batch(step, generator)
        clean = batch.targets
        sigma = self._sigmas(len(clean), generator).to(clean.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = torch.lerp(clean, noise_like(clean, generator), level)
        shown = self._without_some_references(batch, sigma, generator)
        error = (predicted(self._transformer, shown, noisy, sigma) - clean).square()
        weighted = error / level.square() if self._transformer.config.prediction_type == "velocity" else error
        reference = batch.reference[:, :, batch.segment.target_slice]
        numbers = {
            "samples": float(len(clean)),
            "tokens": float(_num_tokens(self._transformer, batch)),
            "x0_error": float(error.mean().detach()),
            "reference_error": float((reference - clean).square().mean()),
        }
        return weighted.mean(), numbers

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(count, generator=generator).clamp(min=1e-3)
        shift = self.options.flow_shift
        sigmas = shift * uniform / (1 + (shift - 1) * uniform)
        pure = torch.rand(count, generator=generator) < self.options.pure_noise_share
        return torch.where(pure, torch.ones(count), sigmas)

    def _without_some_references(self, batch: WindowBatch, sigma: Tensor, generator: torch.Generator) -> WindowBatch:
        chosen = torch.rand(len(sigma), generator=generator).to(sigma.device) < 0.5
        dropped = chosen & (sigma < self.options.keep_reference_above)
        if not dropped.any():
            return batch
        reference = batch.reference.clone()
        reference[dropped] = 0
        return WindowBatch(batch.segment, batch.truth, reference, batch.slots, batch.prompt_embeds)


def _num_tokens(transformer: StageTwoTransformer, batch: WindowBatch) -> int:
    patch: Sequence[int] = transformer.config.patch_size
    size, _, frames, height, width = batch.slots.shape
    return size * frames * (height // patch[1]) * (width // patch[2])


def _tensor(sample: Sample, key: str) -> Tensor:
    if key not in sample.tensors:
        held = ", ".join(sample.tensors) or "nothing"
        msg = f"sample {sample.name!r} of the cache holds {held}, but not {key}; make the cache with train transition"
        raise LatentCacheError(msg)
    return sample.tensors[key]


def _drawn_reference(sample: Sample, rng: np.random.Generator) -> Tensor:
    keys = sorted(key for key in sample.tensors if key.startswith(REFERENCE))
    return _tensor(sample, keys[int(rng.integers(len(keys)))] if keys else f"{REFERENCE}0")
