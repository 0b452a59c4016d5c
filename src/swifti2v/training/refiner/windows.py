"""Random windows of Conditional Segment-wise Generation, as training meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.segments import FrameKind, Segment

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


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
    """Which windows are drawn. All kinds are met, so that one network serves every setting of inference.

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
        for name in ("full_share", "before_share", "after_share", "anchor_share"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name} is {getattr(self, name)}; it must be within 0..1"
                raise ConfigurationError(msg)

    def draw(self, rng: np.random.Generator, num_latent_frames: int, *, segments_before: int = 0) -> Segment:
        """Draw a segment at a random place of a clip; see `draw_shape`."""
        shape = self.draw_shape(rng, num_latent_frames, segments_before=segments_before)
        return shape.draw_place(rng, num_latent_frames)

    def draw_shape(self, rng: np.random.Generator, num_latent_frames: int, *, segments_before: int = 0) -> WindowShape:
        """Draw the shape of a window of a clip of `num_latent_frames` >= 2.

        With `segments_before` it sees a finished neighbour for certain, and so many segments fit before it, of which
        the first may have one target: one segment takes three latent frames, each further one `segment_size` more.

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

    Finished neighbours carry noise of a random deviation up to `noise_deviation`, one for each sample: at inference
    they are the network's own output, never perfect (exposure bias). The anchor is exact there, and here.
    """
    slots = truth.clone()
    strength = noise_deviation * _uniform(truth, generator)
    for place, kind in enumerate(segment.kinds):
        if kind is FrameKind.UNREFINED:
            slots[:, :, place] = reference[:, :, place]
        elif kind is FrameKind.FINISHED:
            slots[:, :, place] += strength * _normal(truth[:, :, place], generator)
    return slots


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    values = like.new_empty(len(like), dtype=like.dtype, device="cpu").uniform_(generator=generator)
    return values.view(-1, 1, 1, 1).to(like.device)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return like.new_empty(like.shape, device="cpu").normal_(generator=generator).to(like.device)
