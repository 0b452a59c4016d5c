"""What the streams of every codec refuse: items of another shape or size, and values that are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swifti2v.errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


def check_latents(latents: Tensor, channels: int, size: tuple[int, int] | None, index: int) -> None:
    """Raise `InvalidInputError` unless `latents` can be an item of a stream.

    Args:
        latents: normalised, float ``[1, channels, n, h, w]``.
        channels: of the codec.
        size: height and width in cells with which the stream began; None: this is its first item.
        index: of the item's first latent frame, for the message.
    """
    usable = latents.ndim == 5 and latents.shape[:2] == (1, channels) and latents.is_floating_point()
    if not usable or 0 in latents.shape:
        msg = (
            f"latents of {describe(latents)} cannot be decoded; "
            f"give normalised floats [1, {channels}, frames, height, width] of this codec"
        )
        raise InvalidInputError(msg)
    if size is not None:
        check_same_size(f"latent frame {index}", tuple(latents.shape[-2:]), size)


def check_same_size(name: str, actual: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Raise `InvalidInputError` unless height and width are those with which the stream began."""
    if actual != expected:
        msg = (
            f"{name} is {actual[1]}x{actual[0]} but the stream began with {expected[1]}x{expected[0]}; "
            "use one stream per size"
        )
        raise InvalidInputError(msg)


def check_finite(values: Tensor, name: str) -> None:
    """Raise `InvalidInputError` if what is given to a codec holds NaN or infinity."""
    if not is_finite(values):
        msg = f"{name} holds NaN or infinity; it comes from the step before, run that in bfloat16 or float32"
        raise InvalidInputError(msg)


def check_result(values: Tensor, dtype: torch.dtype, source: str, index: int) -> None:
    """Raise `CheckpointError` if a network in `dtype` produced NaN or infinity from finite `source` (a word)."""
    if not is_finite(values):
        msg = (
            f"the codec in {dtype} made values that are not finite from the {source} of latent frame "
            f"{index}; load it in bfloat16 or float32, or replace its weights"
        )
        raise CheckpointError(msg)


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity."""
    # On the meta device, where costs are counted, there are no values.
    return values.is_meta or bool(torch.isfinite(values).all())


def describe(tensor: Tensor) -> str:
    """Return shape and dtype, for messages."""
    return f"shape {list(tensor.shape)} and {tensor.dtype}"
