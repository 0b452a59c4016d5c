"""Where Stage II's training windows come from: drawn from a cache of latents, each a function of its number.

`WindowSource.batch` is what objectives call. It draws clips and a segment (in a thread, while the step before trains),
cuts the window out of the clips, and fills its context: finished neighbors come from the truth, or from the network
itself (`with_own_context`), because at inference a neighbor is the network's own output and its errors are handed on
from segment to segment (exposure bias).

Shape suffixes as in `wan/condition.py`: B batch, C channels, W window frames, M target frames, T latent frames of the
clip, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from swifti2v.errors import ConfigurationError, InvalidInputError, LatentCacheError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.solvers import euler
from swifti2v.segments import FrameKind, Segment
from swifti2v.training.engine.samples import Prefetcher
from swifti2v.wan.condition import predict_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from swifti2v.training.engine.samples import Batches, Sample, Samples

LATENTS, PROMPT, REFERENCE = "latents", "prompt_embeds", "reference."
"""Tensors of a sample: `latents` [C,T,h,w], `prompt_embeds` [L,D], ``reference.0``, ``reference.1``, ... [C,T,h,w]."""


def check_shares(options: object, *names: str) -> None:
    """Raise `ConfigurationError` unless these fields of `options` are within 0..1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            msg = f"{name} is {getattr(options, name)}; it must be within 0..1"
            raise ConfigurationError(msg)


@dataclass(frozen=True)
class WindowShape:
    """What a window holds, wherever in a clip it lies: windows of one shape cost the same.

    Args:
        num_targets: latent frames that are restored.
        before, after: finished frames ahead of the targets and unrefined ones behind them, as far as the clip has them.
        anchor: whether the window sees the anchor.
        first: the earliest place of the targets.
    """

    num_targets: int
    before: int
    after: int
    anchor: bool
    first: int

    def draw_place(self, rng: np.random.Generator, num_latent_frames: int) -> Segment:
        """Draw where in a clip of `num_latent_frames` a window of this shape lies."""
        start = int(rng.integers(self.first, num_latent_frames - self.num_targets + 1))
        stop = start + self.num_targets
        return Segment(
            index=0,
            targets=range(start, stop),
            before=range(max(1, start - self.before), start),
            after=range(stop, min(num_latent_frames, stop + self.after)),
            anchor=self.anchor,
        )


@dataclass(frozen=True)
class WindowOptions:
    """Which windows are drawn. Training meets every kind, so that one network serves every setting of inference.

    Args:
        segment_size: most targets of a window, M.
        full_share: share of windows with M targets; the others have fewer, as the last segment of a clip.
        before_share: share of windows that see the finished frame before their targets.
        after_share: share of windows that see the unrefined frame behind them.
        anchor_share: share of windows that see the anchor; below 1 for ablations, whose networks do without it too.

    Raises:
        ConfigurationError: a share is outside 0..1, or there are no targets.
    """

    segment_size: int = 3
    full_share: float = 0.6
    before_share: float = 0.75
    after_share: float = 0.3
    anchor_share: float = 1.0

    def __post_init__(self) -> None:
        if self.segment_size < 1:
            msg = f"segment_size is {self.segment_size}; use at least 1"
            raise ConfigurationError(msg)
        check_shares(self, "full_share", "before_share", "after_share", "anchor_share")

    def draw(self, rng: np.random.Generator, num_latent_frames: int, *, segments_before: int = 0) -> Segment:
        """Draw a segment at a random place of a clip; see `draw_shape`."""
        shape = self.draw_shape(rng, num_latent_frames, segments_before=segments_before)
        return shape.draw_place(rng, num_latent_frames)

    def draw_shape(self, rng: np.random.Generator, num_latent_frames: int, *, segments_before: int = 0) -> WindowShape:
        """Draw the shape of a window of a clip of `num_latent_frames` >= 2.

        With `segments_before` it sees a finished neighbor for certain, and so many segments fit before it, of which the
        first may have one target: one segment takes three latent frames, each further one `segment_size` more.

        Raises:
            InvalidInputError: the clip is too short.
        """
        first = 2 + (segments_before - 1) * self.segment_size if segments_before else 1
        if num_latent_frames <= first:
            msg = f"a window needs more than {first} latent frames, the clip has {num_latent_frames}; use longer clips"
            raise InvalidInputError(msg)
        most = min(self.segment_size, num_latent_frames - first)
        targets = most if most == 1 or rng.random() < self.full_share else int(rng.integers(1, most))
        before = int(segments_before > 0 or rng.random() < self.before_share)
        after = int(rng.random() < self.after_share)
        anchor = self.anchor_share >= 1 or bool(rng.random() < self.anchor_share)
        return WindowShape(targets, before, after, anchor, first)


@dataclass(frozen=True)
class WindowSourceOptions:
    """Which windows a network is trained on, and what it is shown of them.

    Args:
        windows: which windows are drawn.
        flow_shift: time shift of the noise levels, as at inference.
        context_noise: largest deviation of the noise on finished neighbors.
        own_context_share: share of windows whose finished neighbor is the network's own output of the segment before,
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
        check_shares(self, "own_context_share", "prompt_dropped_share")
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


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one shape: truth and reference [B,C,T,h,w], prompts [B,L,D]."""

    truth: Tensor
    reference: Tensor
    prompt_embeds: Tensor

    def to(self, device: torch.device) -> ClipBatch:
        """Return the clips on a device, float32."""
        tensors = (self.truth, self.reference, self.prompt_embeds)
        return ClipBatch(*(tensor.to(device, torch.float32) for tensor in tensors))

    def window(self, segment: Segment, *, context_noise: float, generator: torch.Generator) -> WindowBatch:
        """Return the windows of a segment; finished neighbors are the truth with noise up to `context_noise`."""
        frames = list(segment.window)
        truth, reference = self.truth[:, :, frames], self.reference[:, :, frames]
        slots = context_slots(truth, reference, segment, noise_deviation=context_noise, generator=generator)
        return WindowBatch(segment, truth, with_finished(reference, truth, segment), slots, self.prompt_embeds)


@dataclass(frozen=True)
class WindowBatch:
    """Samples of one window: truth and reference [B,C,W,h,w], slots of the context, prompts [B,L,D]."""

    segment: Segment
    truth: Tensor
    reference: Tensor
    slots: Tensor
    prompt_embeds: Tensor

    @property
    def targets(self) -> Tensor:
        """The clean targets [B,C,M,h,w]."""
        return self.truth[:, :, self.segment.target_slice]

    def seeing(self, made: Tensor) -> WindowBatch:
        """Return the windows with the end of `made` [B,C,>=N,h,w] in the places of the N finished neighbors."""
        places = [place for place, kind in enumerate(self.segment.kinds) if kind is FrameKind.FINISHED]
        if not places:
            return self
        slots, reference = self.slots.clone(), self.reference.clone()
        slots[:, :, places] = reference[:, :, places] = made[:, :, -len(places) :]
        return replace(self, slots=slots, reference=reference)


class DrawnClips(NamedTuple):
    """What a step learns from, on the CPU: clips, the segment, and those before it that the network makes itself."""

    clips: ClipBatch
    segment: Segment
    earlier: tuple[Segment, ...]


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
        clips, segment, earlier = self._drawn.take(step)
        options = self.options
        return with_own_context(
            self._transformer,
            clips.to(device),
            segment,
            earlier=earlier,
            sigmas=shifted_sigmas(options.num_own_context_steps, shift=options.flow_shift),
            context_noise=options.context_noise,
            generator=generator,
        )

    def without_prompts(self, prompt_embeds: Tensor) -> Tensor:
        """Return what stands in the place of prompts [B,L,D] that are dropped: what inference has for no words."""
        if self._empty_prompt is None:
            return torch.zeros_like(prompt_embeds)
        return self._empty_prompt.to(prompt_embeds).expand_as(prompt_embeds)

    def _draw(self, step: int) -> DrawnClips:
        options, rng = self.options, np.random.default_rng([self.options.seed, step])
        chosen = [self._samples[index] for index in self._batches.batch_of(step)]
        truth = torch.stack([_tensor(sample, LATENTS) for sample in chosen])
        reference = torch.stack([_drawn_reference(sample, rng) for sample in chosen])
        prompts = torch.stack([_tensor(sample, PROMPT) for sample in chosen])
        dropped = torch.from_numpy(rng.random(len(chosen)) < options.prompt_dropped_share)
        prompts = torch.where(dropped.view(-1, 1, 1), self.without_prompts(prompts), prompts)
        shared, num_latent_frames = self.shared_by_processes(step, 1), truth.shape[2]
        own = drawn_own_segments(shared, share=options.own_context_share, most=options.own_context_segments)
        shape = options.windows.draw_shape(shared, num_latent_frames, segments_before=own)
        segment = shape.draw_place(rng, num_latent_frames)
        earlier = earlier_segments(segment, segment_size=options.windows.segment_size, count=own)
        return DrawnClips(ClipBatch(truth, reference, prompts), segment, earlier)


def predicted(transformer: nn.Module, batch: WindowBatch, noisy: Tensor, sigma: float | Tensor) -> Tensor:
    """Return x0 of the targets [B,C,M,h,w], float32."""
    return predict_targets(
        transformer,  # type: ignore[arg-type]
        segment=batch.segment,
        slots=batch.slots,
        reference=batch.reference,
        targets=noisy,
        sigma=sigma,
        prompt_embeds=batch.prompt_embeds,
    )


@torch.no_grad()
def sample_targets(
    transformer: nn.Module, batch: WindowBatch, *, sigmas: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Return the targets [B,C,M,h,w] as inference makes them: Euler steps from pure noise along `sigmas`."""
    start = noise_like(batch.targets, generator)
    return euler(lambda x, sigma: predicted(transformer, batch, x, sigma), start, sigmas)


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return unit noise of the shape of `tensor`, drawn on the CPU: the same numbers on every device."""
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def with_own_context(
    transformer: nn.Module,
    clips: ClipBatch,
    segment: Segment,
    *,
    earlier: Sequence[Segment],
    sigmas: Sequence[float],
    context_noise: float,
    generator: torch.Generator,
) -> WindowBatch:
    """Return the windows of `segment`, whose finished neighbor the network makes itself, without gradient.

    Args:
        transformer: the network, as it is now.
        clips: truth and reference of whole clips.
        segment: that sees a finished neighbor.
        earlier: made one after the other, each seeing the end of the one before it; only the first sees the truth.
        sigmas: noise levels of their sampling.
        context_noise: see `ClipBatch.window`.
        generator: of all noise.
    """
    made: Tensor | None = None
    for each in (*earlier, segment):
        window = clips.window(each, context_noise=context_noise, generator=generator)
        shown = window if made is None else window.seeing(made)
        if each is not segment:
            made = sample_targets(transformer, shown, sigmas=sigmas, generator=generator)
    return shown


def drawn_own_segments(rng: np.random.Generator, *, share: float, most: int) -> int:
    """Draw how many segments before a window the network makes itself: 1 to `most` in `share` of the windows."""
    if rng.random() >= share:
        return 0
    return int(rng.integers(most)) + 1


def earlier_segments(segment: Segment, *, segment_size: int, count: int) -> tuple[Segment, ...]:
    """Return the `count` segments that end where the targets of `segment` begin, in the order in which they are made.

    Each sees what `segment` sees, but nothing behind its targets; the first of the clip may be shorter.
    """
    stops = [segment.targets.start - segment_size * back for back in reversed(range(count))]
    starts = [max(1, stop - segment_size) for stop in stops]
    return tuple(
        Segment(0, range(start, stop), range(max(1, start - 1), start), range(0), anchor=segment.anchor)
        for start, stop in zip(starts, stops, strict=True)
    )


def with_finished(reference: Tensor, truth: Tensor, segment: Segment) -> Tensor:
    """Return the reference of a window [B,C,W,h,w] with what is finished written back into it (paper, "Update")."""
    written = reference.clone()
    for place, kind in enumerate(segment.kinds):
        if kind in {FrameKind.ANCHOR, FrameKind.FINISHED}:
            written[:, :, place] = truth[:, :, place]
    return written


def context_slots(
    truth: Tensor, reference: Tensor, segment: Segment, *, noise_deviation: float, generator: torch.Generator
) -> Tensor:
    """Return the slots of a window [B,C,W,h,w]: truth where it is finished, the reference where it is unrefined.

    Finished neighbors carry noise of a random deviation up to `noise_deviation`, one for each sample: at inference they
    are the network's own output, never perfect (exposure bias). The anchor is exact there, and here.
    """
    slots = truth.clone()
    deviation = noise_deviation * torch.rand(len(truth), generator=generator).to(truth)
    for place, kind in enumerate(segment.kinds):
        if kind is FrameKind.UNREFINED:
            slots[:, :, place] = reference[:, :, place]
        elif kind is FrameKind.FINISHED:
            slots[:, :, place] += deviation.view(-1, 1, 1, 1) * noise_like(truth[:, :, place], generator)
    return slots


def _tensor(sample: Sample, key: str) -> Tensor:
    if key not in sample.tensors:
        held = ", ".join(sample.tensors) or "nothing"
        msg = f"sample {sample.name!r} of the cache holds {held}, but not {key}; make the cache with train transition"
        raise LatentCacheError(msg)
    return sample.tensors[key]


def _drawn_reference(sample: Sample, rng: np.random.Generator) -> Tensor:
    keys = sorted(key for key in sample.tensors if key.startswith(REFERENCE))
    return _tensor(sample, keys[int(rng.integers(len(keys)))] if keys else f"{REFERENCE}0")
