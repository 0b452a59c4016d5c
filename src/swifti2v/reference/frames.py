"""From pieces of motion reference of any length to single frames, and from single frames to chunks of latent frames."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from swifti2v.errors import InvalidInputError, VideoInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


def check_image(image: Tensor) -> None:
    """Raise `InvalidInputError` unless `image` is a floating tensor [3, H, W]."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        msg = f"the image is {image.dtype} of shape {tuple(image.shape)}; pass floats of shape [3, H, W] in [-1, 1]"
        raise InvalidInputError(msg)


def single_frames(motion: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the frames [h, w, 3] of pieces uint8 [n, h, w, 3] in order, one at a time.

    Raises:
        VideoInputError: a piece has another type or shape, frames change their size, or there is no frame at all.
    """
    size: tuple[int, ...] | None = None
    for piece in motion:
        if piece.ndim != 4 or piece.shape[-1] != 3 or piece.dtype != torch.uint8:
            msg = f"a piece of motion reference is {piece.dtype} {tuple(piece.shape)}; pass uint8 of shape [n, h, w, 3]"
            raise VideoInputError(msg)
        size = size or tuple(piece.shape[1:])
        if tuple(piece.shape[1:]) != size:
            msg = f"the motion reference changes its size from {size} to {tuple(piece.shape[1:])}; keep one size"
            raise VideoInputError(msg)
        yield from piece
    if size is None:
        msg = "the motion reference has no frames; pass at least one"
        raise VideoInputError(msg)


def split_first(frames: Iterator[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first frame and the iterator of all frames (the first among them)."""
    try:
        first = next(frames)
    except StopIteration:
        msg = "the motion reference has no frames; pass at least one"
        raise VideoInputError(msg) from None
    return first, chain((first,), frames)


def in_chunks(frames: Iterable[Tensor], temporal_factor: int) -> Iterator[Tensor]:
    """Gather single frames [C, H, W] to the chunks [1, C, f, H, W] of latent frames, f = 1, then `temporal_factor`.

    Raises:
        VideoInputError: the frames end within a chunk (their number is not ``temporal_factor * k + 1``).
    """
    chunks: list[Tensor] = []  # the one at work, in a list so that handing it out leaves no name to hold it
    filled, wanted, count = 0, 1, 0
    for frame in frames:
        if not chunks:
            # Filled frame by frame: collecting and then stacking would hold frames (43 MB each at 2560x1408) twice.
            chunks.append(frame.new_empty((1, frame.shape[0], wanted, *frame.shape[1:])))
        chunks[0][0, :, filled] = frame
        filled, count = filled + 1, count + 1
        if filled == wanted:
            del frame
            yield chunks.pop()
            filled, wanted = 0, temporal_factor
    if filled:
        below = count - filled
        msg = (
            f"the motion reference has {count} frames, which do not divide into latent frames; "
            f"use {temporal_factor}k+1 frames, for instance {below} or {below + temporal_factor}"
        )
        raise VideoInputError(msg)
