"""Do the borders of segments show? Change across them, against the change across the other latent frames' borders."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from swifti2v.errors import InvalidInputError
from swifti2v.evaluation.metrics import high_pass
from swifti2v.evaluation.motion import FramePair, luma

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Array = np.ndarray[Any, Any]

# In [0, 1] gray: half a level of eight bits. Keeps the ratio of a video in which nothing changes at 1.
CHANGE_FLOOR = 0.5 / 255


class FrameChange(NamedTuple):
    """Motion-compensated change between frames: mean absolute difference on visible pixels, in [0, 1] gray."""

    luma: float
    detail: float


class SeamRatio(NamedTuple):
    """Change at segment borders over change at other latent-frame borders; 1 = not to be told apart, above 1 = seams.

    Args:
        luma: of all frequencies: sees jumps of brightness.
        detail: of the high-pass alone (`metrics.high_pass`): sees jumps of sharpness and texture.
    """

    luma: float
    detail: float

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.luma, self.detail)


def frame_change(pair: FramePair) -> FrameChange:
    """Return the change between two frames that motion does not explain; NaN if no pixel is visible."""
    seen = pair.visible
    if not seen.any():
        return FrameChange(math.nan, math.nan)
    whole = np.abs(luma(pair.later) - luma(pair.predicted))[seen]
    detail = np.abs(high_pass(pair.later) - high_pass(pair.predicted))[seen]
    return FrameChange(float(whole.mean(dtype=np.float64)), float(detail.mean(dtype=np.float64)))


def seam_ratio(changes: Iterable[FrameChange], *, segment_size: int, temporal_factor: int = 4) -> SeamRatio:
    """Return how much more a video changes at segment borders than at the other borders of latent frames.

    c_t is the motion-compensated change from frame t-1 to t, r_t = c_t over the mean of c_(t-1) and c_(t+1), which
    takes out how lively the scene is just then. The ratio is the mean r_t at segment borders, ``t = 1 + temporal_factor
    * segment_size * s``, s >= 1, over the mean r_t at the other ``t = 1 + temporal_factor * k``, k >= 1. About 1
    without seams; NaN if the video is too short to have both kinds of border. The published 2K samples score 0.95-1.05
    by a like measure.

    Args:
        changes: `frame_change` from frame 0 to 1, from 1 to 2, ...
        segment_size: M, latent frames in a segment, >= 2 (with 1 every border is a segment's).
        temporal_factor: pixel frames per latent frame.

    Raises:
        InvalidInputError: `segment_size` or `temporal_factor` is below 2.
    """
    if min(segment_size, temporal_factor) < 2:
        msg = f"segment_size is {segment_size}, temporal_factor {temporal_factor}; both must be at least 2"
        raise InvalidInputError(msg, param="segment_size", value=segment_size)
    luma_changes, detail_changes = zip(*changes, strict=True) if (changes := list(changes)) else ((), ())
    return SeamRatio(
        _border_ratio(luma_changes, segment_size, temporal_factor),
        _border_ratio(detail_changes, segment_size, temporal_factor),
    )


def _border_ratio(changes: Sequence[float], segment_size: int, temporal_factor: int) -> float:
    """Return the ratio for one kind of change; ``changes[t - 1]`` is that from frame t-1 to t."""
    at_segments: list[float] = []
    at_others: list[float] = []
    for t in range(1 + temporal_factor, len(changes), temporal_factor):
        around = (changes[t - 2] + changes[t]) / 2
        relative = (changes[t - 1] + CHANGE_FLOOR) / (around + CHANGE_FLOOR)
        is_segment = (t - 1) // temporal_factor % segment_size == 0
        if math.isfinite(relative):
            (at_segments if is_segment else at_others).append(relative)
    if not at_segments or not at_others:
        return math.nan
    return (math.fsum(at_segments) / len(at_segments)) / (math.fsum(at_others) / len(at_others))
