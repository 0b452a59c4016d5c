"""What configuration and input of `StageTwoTransformer` must satisfy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from swifti2v.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

PredictionType = Literal["velocity", "residual"]
ContextAttention = Literal["bidirectional", "frozen"]
"""Whether the tokens of the context attend to the targets (`context_attention.py`)."""


def check_configuration(
    patch_size: tuple[int, ...],
    *,
    in_channels: int,
    out_channels: int,
    reference_channels: int,
    prediction_type: str,
    context_attention: str,
) -> None:
    """Raise `ConfigurationError` unless channels add up, the patch is flat in time and the ways are known ones."""
    if reference_channels < 0 or in_channels != out_channels + reference_channels:
        msg = (
            f"in_channels is {in_channels}, not out_channels {out_channels} + reference_channels {reference_channels}; "
            "set reference_channels to the channels behind the slots"
        )
        raise ConfigurationError(msg)
    if len(patch_size) != 3 or patch_size[0] != 1:
        msg = f"patch_size is {tuple(patch_size)}; Stage II counts latent frames, so the first must be 1 of three"
        raise ConfigurationError(msg)
    for name, value, known in (
        ("prediction_type", prediction_type, get_args(PredictionType)),
        ("context_attention", context_attention, get_args(ContextAttention)),
    ):
        if value not in known:
            msg = f"{name} is {value!r}; use one of {', '.join(known)}"
            raise ConfigurationError(msg)


def check_frame_numbers(name: str, numbers: Tensor | None, frames: int, stop: int) -> None:
    """Raise `InvalidInputError` unless `numbers`, if given, is a whole number in [0, stop) for each of `frames`."""
    if numbers is None:
        return
    if numbers.shape != (frames,) or numbers.is_floating_point():
        msg = f"{name} is {numbers.dtype} {tuple(numbers.shape)}; give {frames} integers, one a frame"
        raise InvalidInputError(msg)
    # A trace cannot branch on values; whoever compiles the whole network checks them before.
    if not torch.compiler.is_compiling() and not 0 <= int(numbers.min()) <= int(numbers.max()) < stop:
        msg = f"{name} is {numbers.tolist()}; each must be at least 0 and less than {stop}"
        raise InvalidInputError(msg)
