"""Windows for the objectives of Stage II, from a cache of latents (`encoding.py`): each a function of its number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from swifti2v.errors import ConfigurationError, LatentCacheError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.training.engine.prefetcher import Prefetcher
from swifti2v.training.refiner.window_batches import (
    ClipBatch,
    WindowBatch,
    drawn_own_segments,
    earlier_segments,
    with_own_context,
)
from swifti2v.training.refiner.windows import WindowOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from swifti2v.segments import Segment

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
class WindowSourceOptions:
    """Which windows a network is trained on, and what it is shown of them.

    Args:
        windows: which windows are drawn.
        flow_shift: time shift of the noise levels, as at inference.
        context_noise: largest deviation of the noise on finished neighbours.
        own_context_share: share of windows whose finished neighbour is the network's own output of the segment before,
            made without gradient (exposure bias).
        own_context_steps: sampling steps of each of those segments; a step costs a forward. None: one, and in
            distillation as many as the student is to take.
        own_context_segments: most segments that the network makes one after the other before a window; how many is
            drawn from 1 to this. Clips have to be long enough for the most.
        prompt_dropped_share: share of samples with an empty prompt, for guidance.
        seed: of everything drawn.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    windows: WindowOptions = field(default_factory=WindowOptions)
    flow_shift: float = 5.0
    context_noise: float = 0.05
    own_context_share: float = 0.0
    own_context_steps: int | None = None
    own_context_segments: int = 1
    prompt_dropped_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_shares("own_context_share", "prompt_dropped_share")
        if self.flow_shift <= 0 or self.context_noise < 0:
            msg = f"flow_shift is {self.flow_shift}, context_noise {self.context_noise}; use above 0 and at least 0"
            raise ConfigurationError(msg)
        if min(self.num_own_context_steps, self.own_context_segments) < 1:
            msg = "own_context_steps and own_context_segments must be at least 1"
            raise ConfigurationError(msg)

    @property
    def num_own_context_steps(self) -> int:
        """Sampling steps of a segment that the network makes itself."""
        return 1 if self.own_context_steps is None else self.own_context_steps

    def _check_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name} is {getattr(self, name)}; it must be within 0..1"
                raise ConfigurationError(msg)


class _DrawnClips(NamedTuple):
    """What a step learns from, on the CPU: clips, the segment, and how many before it the network makes itself."""

    clips: ClipBatch
    segment: Segment
    num_own_segments: int


class WindowSource:
    """Draws the windows of a step from a cache: a function of the weights (own context), the options and the step.

    Args:
        transformer: whose own output serves as context, if `own_context_share` asks for it.
        samples: latents, read in a thread while the step before trains.
        batches: which of them make a batch.
        options: see there.
        num_processes: that train together and count their steps in turn. All of them make their own context at the same
            time, because each forward of a sharded network is a meeting of all processes, and have windows of one
            shape, because the others would wait for the longest.
        empty_prompt: [L,D], in the place of prompts that are dropped; None: zeros, for networks that read no prompt.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        samples: Samples,
        batches: Batches,
        options: WindowSourceOptions,
        num_processes: int = 1,
        empty_prompt: Tensor | None = None,
    ) -> None:
        self.options = options
        self._num_processes = num_processes
        self._transformer = transformer
        self._samples = samples
        self._batches = batches
        self._empty_prompt = empty_prompt
        self._drawn = Prefetcher(self._draw)

    def generator(self, step: int) -> torch.Generator:
        """Return the source of a step's noise."""
        return torch.Generator("cpu").manual_seed(self.options.seed * 1_000_003 + step)

    def shared_by_processes(self, step: int, purpose: int) -> np.random.Generator:
        """Return a source of numbers that are the same in every process, one for each `purpose`; windows take 1."""
        return np.random.default_rng([self.options.seed, step // self._num_processes, purpose])

    def batch(self, step: int, generator: torch.Generator) -> WindowBatch:
        """Return the windows of a step on the transformer's device, float32."""
        device = next(self._transformer.parameters()).device
        clips, segment, num_own_segments = self._drawn.take(step)
        options = self.options
        return with_own_context(
            self._transformer,
            clips.to(device),
            segment,
            earlier=earlier_segments(segment, segment_size=options.windows.segment_size, count=num_own_segments),
            sigmas=shifted_sigmas(options.num_own_context_steps, shift=options.flow_shift),
            context_noise=options.context_noise,
            generator=generator,
        )

    def without_prompts(self, prompt_embeds: Tensor) -> Tensor:
        """Return what stands in the place of prompts [B,L,D] that are dropped: what inference has for no words."""
        if self._empty_prompt is None:
            return torch.zeros_like(prompt_embeds)
        return self._empty_prompt.to(prompt_embeds).expand_as(prompt_embeds)

    def _draw(self, step: int) -> _DrawnClips:
        rng = np.random.default_rng([self.options.seed, step])
        chosen = [self._samples[index] for index in self._batches.batch_of(step)]
        truth = torch.stack([_tensor(sample, LATENTS) for sample in chosen])
        reference = torch.stack([_drawn_reference(sample, rng) for sample in chosen])
        prompts = torch.stack([_tensor(sample, PROMPT) for sample in chosen])
        dropped = torch.from_numpy(rng.random(len(chosen)) < self.options.prompt_dropped_share)
        prompts = torch.where(dropped.view(-1, 1, 1), self.without_prompts(prompts), prompts)
        shared, num_latent_frames = self.shared_by_processes(step, 1), truth.shape[2]
        own = drawn_own_segments(shared, share=self.options.own_context_share, most=self.options.own_context_segments)
        shape = self.options.windows.draw_shape(shared, num_latent_frames, segments_before=own)
        return _DrawnClips(ClipBatch(truth, reference, prompts), shape.draw_place(rng, num_latent_frames), own)


def _tensor(sample: Sample, key: str) -> Tensor:
    if key not in sample.tensors:
        held = ", ".join(sample.tensors) or "nothing"
        msg = f"sample {sample.name!r} of the cache holds {held}, but not {key}; make the cache with train transition"
        raise LatentCacheError(msg)
    return sample.tensors[key]


def _drawn_reference(sample: Sample, rng: np.random.Generator) -> Tensor:
    keys = sorted(key for key in sample.tensors if key.startswith(REFERENCE))
    return _tensor(sample, keys[int(rng.integers(len(keys)))] if keys else f"{REFERENCE}0")
