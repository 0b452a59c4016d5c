"""A long clip as overlapping windows of pixel frames: where they lie, and how one is joined to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry

if TYPE_CHECKING:
    from torch import Tensor


def plan_windows(num_frames: int, *, window_frames: int, overlap_frames: int, temporal: int = 4) -> tuple[range, ...]:
    """Cut a clip into windows of pixel frames, as few and as equal as can be; neighbours share `overlap_frames`.

    Args:
        num_frames: 4k+1.
        window_frames: 4k+1, the longest window.
        overlap_frames: 4k+1 and less than `window_frames`; a window makes again the last `overlap_frames` of the one
            before it, the first of them being the frame it continues from.
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


def match_color(frames: Tensor, target: Tensor) -> Tensor:
    """Shift and scale each colour of a window so that its first frame has the mean and deviation of `target`.

    The first frame repeats `target` up to the codec, whose small colour error would add up from window to window. The
    scale is kept within 10%, so that a first frame that differs for another reason is not forced into shape.

    Args:
        frames: [n,h,w,3] in [0,1].
        target: [h,w,3] in [0,1], the frame that the window continues.

    Returns:
        [n,h,w,3] in [0,1].
    """
    mean, deviation = frames[0].mean(dim=(0, 1)), frames[0].std(dim=(0, 1), correction=0)
    wanted_mean, wanted_deviation = target.mean(dim=(0, 1)), target.std(dim=(0, 1), correction=0)
    gain = (wanted_deviation / deviation.clamp_min(1e-4)).clamp(0.9, 1.1)
    return ((frames - mean) * gain + wanted_mean).clamp(0.0, 1.0)


def cross_fade(held: Tensor, frames: Tensor) -> Tensor:
    """Blend the start of a window into the end of the one before it.

    Args:
        held: [m,h,w,3], the last frames of the window before.
        frames: [n,h,w,3] with n > m; its first m frames are those of `held` made again.

    Returns:
        [n,h,w,3]: frame 0 is ``held[0]``, then the share of `frames` grows by 1/m a frame until it is all at frame m.
    """
    share = (torch.arange(len(held), dtype=frames.dtype) / len(held)).view(-1, 1, 1, 1)
    return torch.cat([torch.lerp(held, frames[: len(held)], share), frames[len(held) :]])
