"""The paper's hybrid reference: the upsampled motion reference with its first frame replaced by the input image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from swifti2v.reference.frames import check_image, in_chunks, single_frames
from swifti2v.reference.resample import upsample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


def to_unit(frame: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return a frame uint8 [h, w, 3] as float32 in [-1, 1] on the CPU."""
    return frame.cpu().numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)


def replace_first_frame(
    motion: Iterable[Tensor], image: Tensor, *, device: torch.device | None = None, temporal_factor: int = 4
) -> Iterator[Tensor]:
    """Yield the upsampled motion reference chunk by chunk, frame 0 being the image exactly (paper, figure "Method").

    Args:
        motion: uint8 pieces [n, h, w, 3] of any length, in order; consumed as far as needed.
        image: [3, H, W] float in [-1, 1], at output size.
        device: where the chunks are wanted; the image's if None.
        temporal_factor: pixel frames per latent frame after the first.

    Returns:
        Chunks [1, 3, f, H, W] float32 in [-1, 1], f = 1, then `temporal_factor`.

    Raises:
        InvalidInputError: the image has another shape or type.
        VideoInputError: so has the motion reference, or its frames do not divide into latent frames.
    """
    check_image(image)
    device = torch.device(device or image.device)
    height, width = image.shape[-2:]

    def frames() -> Iterator[Tensor]:
        for index, frame in enumerate(single_frames(motion)):
            if index == 0:
                yield image.to(device, torch.float32)
            else:
                yield upsample(to_unit(frame), height, width, device=device).clamp(-1, 1)

    return in_chunks(frames(), temporal_factor)
