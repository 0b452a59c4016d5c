"""Conditional segment-wise generation, the bookkeeping (paper, figure CSG). Pure Python.

T latent frames; frame 0 is the anchor. Segment s targets ``[1 + s*M, min(1 + (s+1)*M, T))`` and sees, besides its
targets, the anchor, the `before` frames ahead of them (finished) and the `after` frames behind them (not yet refined).
For ablations: without the anchor, frame 0 is a finished frame like any other, seen where it is one of the `before`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry

PositionMode = Literal["absolute", "compact"]


class FrameKind(IntEnum):
    """What a latent frame is to the segment that sees it; the values index an embedding table of the network."""

    TARGET = 0
    ANCHOR = 1
    FINISHED = 2
    UNREFINED = 3


@dataclass(frozen=True)
class Segment:
    """One segment: the latent frames it makes and those it sees.

    The window is ordered in time: the anchor if the segment sees it, neighbors before, targets, neighbors after.
    """

    index: int
    targets: range
    before: range
    after: range
    anchor: bool = True

    @property
    def window(self) -> tuple[int, ...]:
        """Latent frame indices of the window, in time order."""
        return (*self._anchors, *self.before, *self.targets, *self.after)

    @property
    def kinds(self) -> tuple[FrameKind, ...]:
        """Kind of each frame of `window`."""
        return (
            *(FrameKind.ANCHOR for _ in self._anchors),
            *(FrameKind.FINISHED for _ in self.before),
            *(FrameKind.TARGET for _ in self.targets),
            *(FrameKind.UNREFINED for _ in self.after),
        )

    @property
    def target_slice(self) -> slice:
        """Where the targets stand in `window`."""
        start = len(self._anchors) + len(self.before)
        return slice(start, start + len(self.targets))

    @property
    def _anchors(self) -> range:
        return range(int(self.anchor))

    def positions(self, mode: PositionMode = "absolute") -> tuple[int, ...]:
        """RoPE positions in time: the latent index (`absolute`), or the place in the window (`compact`)."""
        if mode not in get_args(PositionMode):
            msg = f"positions {mode!r} are unknown; use {' or '.join(get_args(PositionMode))}"
            raise InvalidInputError(msg)
        return self.window if mode == "absolute" else tuple(range(len(self.window)))


def plan_segments(
    num_latent_frames: int,
    *,
    segment_size: int = 3,
    neighbors_before: int = 1,
    neighbors_after: int = 0,
    anchor: bool = True,
) -> tuple[Segment, ...]:
    """Cut a clip into segments; every latent frame >= 1 is a target exactly once, in order.

    Args:
        num_latent_frames: T >= 1; a clip of one frame has no segments.
        segment_size: M >= 1 targets a segment; the last segment may be shorter.
        neighbors_before: N >= 0 finished frames seen ahead of the targets.
        neighbors_after: N >= 0 unrefined frames seen behind the targets.
        anchor: whether every segment sees frame 0, which then is no neighbor. Without neighbors too, a segment with
            the anchor is independent of the others, and one without it is alone with its targets.

    Raises:
        InvalidInputError: a number is out of its range.
    """
    for name, value, least in (
        ("num_latent_frames", num_latent_frames, 1),
        ("segment_size", segment_size, 1),
        ("neighbors_before", neighbors_before, 0),
        ("neighbors_after", neighbors_after, 0),
    ):
        if value < least:
            msg = f"{name} is {value}; it must be at least {least}"
            raise InvalidInputError(msg)
    pieces = [range(j, min(j + segment_size, num_latent_frames)) for j in range(1, num_latent_frames, segment_size)]
    return tuple(
        Segment(
            index=index,
            targets=targets,
            before=range(max(int(anchor), targets.start - neighbors_before), targets.start),
            after=range(targets.stop, min(targets.stop + neighbors_after, num_latent_frames)),
            anchor=anchor,
        )
        for index, targets in enumerate(pieces)
    )


def plan_windows(num_frames: int, *, window_frames: int, overlap_frames: int, temporal: int = 4) -> tuple[range, ...]:
    """Cut a clip for Stage I into windows of pixel frames, as few and as equal as can be.

    Args:
        num_frames: 4k+1.
        window_frames: 4k+1, the longest window.
        overlap_frames: 4k+1 and less than `window_frames`; a window makes again the last `overlap_frames` of the one
            before it, the first of them being the frame that it continues from.
        temporal: the 4 in 4k+1.

    Returns:
        Ranges of pixel frames; every length is 4k+1 and at most `window_frames`.

    Raises:
        InvalidInputError: a number has another form.
    """
    geometry = CodecGeometry(temporal=temporal)
    total, longest, shared = (geometry.latent_frames(n) - 1 for n in (num_frames, window_frames, overlap_frames))
    if shared >= longest:
        msg = f"windows of {window_frames} frames cannot overlap by {overlap_frames}; use fewer overlapping frames"
        raise InvalidInputError(msg)
    count = max(1, -(-(total - shared) // (longest - shared)))
    base, longer = divmod(total + (count - 1) * shared, count)
    windows: list[range] = []
    start = 0
    for index in range(count):
        length = base + (index < longer)
        windows.append(range(start * temporal, (start + length) * temporal + 1))
        start += length - shared
    return tuple(windows)


def max_window(segment_size: int, neighbors_before: int, neighbors_after: int, *, anchor: bool = True) -> int:
    """Return the most latent frames that any window of such a plan holds, whatever the length of the clip."""
    return int(anchor) + neighbors_before + segment_size + neighbors_after
