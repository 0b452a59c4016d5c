"""How one window of a long Stage I clip is joined to the next (`segments.plan_windows` says where they lie)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


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
