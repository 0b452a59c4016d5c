"""Pixels as networks want them (float in [-1, 1], channels first) and as files do (uint8, channels last)."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

    import numpy as np
    from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert ``[1, 3, F, H, W]`` floats in [-1, 1] to uint8 ``[F, H, W, 3]`` on the CPU.

    A level is ``round((x + 1) * 127.5)``, ties to even; values outside the range are clamped.
    """
    _, channels, num_frames, height, width = pixels.shape
    levels = torch.empty((num_frames, height, width, channels), dtype=torch.uint8)
    # A frame at a time: at 2560x1408 the floats of one are 43 MB.
    for frame, result in zip(pixels[0].unbind(1), levels, strict=True):
        rounded = frame.float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
        result.copy_(rounded.to(torch.uint8).permute(1, 2, 0))
    return levels


def stream_to_uint8(chunks: Generator[Tensor, None, None]) -> Generator[Tensor, None, None]:
    """Convert chunks as they come, each by `to_uint8`; their stream ends with this one.

    The floats of a chunk are let go before its frames are handed out: at 2560x1408 those of four frames are 173 MB.
    """
    with closing(chunks):
        for chunk in chunks:
            frames = to_uint8(chunk)
            del chunk
            yield frames
            del frames


def from_uint8(frames: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Convert uint8 ``[F, H, W, 3]`` to floats ``[1, 3, F, H, W]`` in [-1, 1]; inverse of `to_uint8`."""
    return torch.as_tensor(frames).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1.0)
