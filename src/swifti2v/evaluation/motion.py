"""Two frames and the motion between them: what every motion-compensated measure stands on.

Frames are RGB, [H, W, 3], uint8 or float32 in [0, 1]. The flow is DIS (Kroeger et al., ECCV 2016) at full resolution,
of the measured frames themselves, so that a measure needs nothing but the video.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from swifti2v.errors import VideoInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Array = np.ndarray[Any, Any]


def unit_rgb(frame: Array) -> Array:
    """Return a frame [H, W, 3], uint8 or float in [0, 1], as float32; raise `VideoInputError` for another kind."""
    known_type = frame.dtype == np.uint8 or np.issubdtype(frame.dtype, np.floating)
    if frame.ndim != 3 or frame.shape[-1] != 3 or not known_type:
        msg = f"a frame is {frame.dtype} of shape {frame.shape}; pass uint8, or floats in [0, 1], of shape [H, W, 3]"
        raise VideoInputError(msg)
    if frame.dtype == np.uint8:
        return frame.astype(np.float32) / np.float32(255)
    return frame.astype(np.float32, copy=False)


def check_same_size(first: Array, second: Array) -> None:
    """Raise `VideoInputError` unless two frames have the same shape."""
    if first.shape != second.shape:
        msg = f"frames of sizes {first.shape[:2]} and {second.shape[:2]} cannot be compared; use one size"
        raise VideoInputError(msg)


def luma(frame: Array) -> Array:
    """Return the gray of a frame (ITU-R BT.601 weights of its gamma-coded values), [H, W] float32 in [0, 1]."""
    return np.asarray(cv2.cvtColor(unit_rgb(frame), cv2.COLOR_RGB2GRAY))


def optical_flow(source: Array, target: Array) -> Array:
    """Return the motion of the content of `source`, [H, W, 2] float32 in pixels, x first.

    ``target(x + flow(x))`` resembles ``source(x)``; both are gray [H, W] float in [0, 1]. DIS, preset
    MEDIUM, down to full resolution.
    """
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    return np.asarray(estimator.calc(_eight_bits(source), _eight_bits(target), None), dtype=np.float32)


def warp_by(frame: Array, flow: Array) -> Array:
    """Return ``frame(x + flow(x))``, bicubic, of [H, W] or [H, W, C] float32; edges are repeated outside."""
    x, y = _places(flow)
    return np.asarray(cv2.remap(frame, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))


def shown_before(flow: Array, reverse: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return which pixels the other frame shows too, [H, W] bool, and where (x and y, [H, W] float32).

    Not those whose place lies outside the picture, nor occluded ones (Ruder et al., GCPR 2016): with w the flow and w'
    the reverse flow at its end, where ``|w + w'|^2 > 0.01 (|w|^2 + |w'|^2) + 0.5``.

    Args:
        flow: [H, W, 2], from the frame whose pixels are asked about to the other.
        reverse: [H, W, 2], from the other frame back.
    """
    x, y = _places(flow)
    height, width = flow.shape[:2]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = np.asarray(cv2.remap(reverse, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    occluded = _squared(flow + back) > 0.01 * (_squared(flow) + _squared(back)) + 0.5
    return np.asarray(inside & ~occluded), (x, y)


def visible(flow: Array, reverse: Array) -> Array:
    """Return where `flow` may be trusted, [H, W] bool: `shown_before`, and not at boundaries of motion.

    Boundary, as in Lai et al. (ECCV 2018): ``|grad u|^2 + |grad v|^2 > 0.01 |w|^2 + 0.002``. Arguments as there.
    """
    shown, _ = shown_before(flow, reverse)
    gradient = _squared(np.gradient(flow, axis=0)) + _squared(np.gradient(flow, axis=1))
    return np.asarray(shown & (gradient <= 0.01 * _squared(flow) + 0.002))


class FramePair:
    """A frame and an earlier one, with the flows between them computed when first asked for.

    Args:
        earlier: [H, W, 3] uint8 or float in [0, 1].
        later: the same size.

    Raises:
        VideoInputError: the frames are of another kind, or of two sizes.
    """

    def __init__(self, earlier: Array, later: Array) -> None:
        check_same_size(earlier, later)
        self.earlier, self.later = unit_rgb(earlier), unit_rgb(later)

    @cached_property
    def forward(self) -> Array:
        """Motion of the earlier frame's content, [H, W, 2] float32 in pixels."""
        return optical_flow(luma(self.earlier), luma(self.later))

    @cached_property
    def backward(self) -> Array:
        """Where each pixel of the later frame came from, relative to itself, [H, W, 2] float32 in pixels."""
        return optical_flow(luma(self.later), luma(self.earlier))

    @cached_property
    def visible(self) -> Array:
        """Pixels of the later frame that the earlier one shows too, [H, W] bool."""
        return visible(self.backward, self.forward)

    @cached_property
    def predicted(self) -> Array:
        """The earlier frame moved to the later one, [H, W, 3] float32; meaningful where `visible`."""
        return warp_by(self.earlier, self.backward)


def consecutive_pairs(frames: Iterable[Array]) -> Iterator[FramePair]:
    """Yield each two neighboring frames of a video; holds two frames at a time."""
    earlier: Array | None = None
    for frame in frames:
        if earlier is not None:
            yield FramePair(earlier, frame)
        earlier = frame


def _eight_bits(gray: Array) -> Array:
    return np.asarray(np.rint(gray.clip(0, 1) * 255), dtype=np.uint8)


def _places(flow: Array) -> tuple[Array, Array]:
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return x, y


def _squared(vectors: Any) -> Array:
    return np.asarray((vectors**2).sum(axis=-1))
