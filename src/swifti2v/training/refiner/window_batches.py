"""A batch of windows as Stage II meets them in training, and what the network makes of one.

Context comes from the truth, or from the network itself (`with_own_context`): at inference a finished neighbour is the
network's own output, and what it gets wrong is handed on from segment to segment (exposure bias).
Shape suffixes as in `wan/condition.py`: B batch, C channels, W window frames, M target frames, T latent frames of
the clip, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from swifti2v.sampling.solvers import euler
from swifti2v.segments import FrameKind, Segment
from swifti2v.training.refiner.windows import context_slots, with_finished
from swifti2v.wan.condition import predict_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor, nn


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
        """Return the windows of a segment; finished neighbours are the truth with noise up to `context_noise`."""
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
        """Return the windows with the end of `made` [B,C,>=N,h,w] in the places of the N finished neighbours."""
        places = [place for place, kind in enumerate(self.segment.kinds) if kind is FrameKind.FINISHED]
        if not places:
            return self
        slots, reference = self.slots.clone(), self.reference.clone()
        slots[:, :, places] = reference[:, :, places] = made[:, :, -len(places) :]
        return replace(self, slots=slots, reference=reference)


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
        Segment(
            index=0,
            targets=range(start, stop),
            before=range(max(1, start - 1), start),
            after=range(0),
            anchor=segment.anchor,
        )
        for start, stop in zip(starts, stops, strict=True)
    )


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
    """Return the windows of `segment`, whose finished neighbour the network makes itself, without gradient.

    Args:
        transformer: the network, as it is now.
        clips: truth and reference of whole clips.
        segment: that sees a finished neighbour.
        earlier: made one after the other, each seeing the end of the one before it; only the first sees the truth.
        sigmas: noise levels of their sampling.
        context_noise: see `ClipBatch.window`.
        generator: of all noise.
    """
    made: Tensor | None = None
    for each in earlier:
        window = clips.window(each, context_noise=context_noise, generator=generator)
        shown = window if made is None else window.seeing(made)
        made = sample_targets(transformer, shown, sigmas=sigmas, generator=generator)
    window = clips.window(segment, context_noise=context_noise, generator=generator)
    return window if made is None else window.seeing(made)
