"""What configuration and input of `StageTwoTransformer` must satisfy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.segments import FrameKind

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


def checked_grid(
    config: Any, hidden_states: Tensor, timestep: Tensor, positions: Tensor | None, kinds: Tensor | None
) -> tuple[int, int, int]:
    """Return how many tokens lie along each axis: frames, rows, columns.

    Args:
        config: that of a `StageTwoTransformer`.
        hidden_states: see `StageTwoTransformer.forward`, as for the others.
        timestep: ``[B]`` or ``[B, F]``.
        positions: ``[F]``, if given.
        kinds: ``[F]``, if given.

    Raises:
        InvalidInputError: they do not fit together or the configuration.
    """
    if hidden_states.ndim != 5 or hidden_states.shape[1] != config.in_channels:
        msg = f"hidden_states is {tuple(hidden_states.shape)}; give [B, {config.in_channels}, F, H, W]"
        raise InvalidInputError(msg)
    batch, _, frames, height, width = hidden_states.shape
    limit = config.rope_max_seq_len
    _, patch_height, patch_width = config.patch_size
    if height % patch_height or width % patch_width:
        msg = f"latents of {height}x{width} do not divide into patches of {patch_height}x{patch_width}; crop them"
        raise InvalidInputError(msg)
    grid = (frames, height // patch_height, width // patch_width)
    if max(grid) > limit:
        msg = f"a window of {frames} frames of {height}x{width} exceeds the RoPE table of {limit}; make it smaller"
        raise InvalidInputError(msg)
    if tuple(timestep.shape) not in {(batch,), (batch, frames)}:
        msg = f"timestep is {tuple(timestep.shape)}; give [{batch}] or one a frame, [{batch}, {frames}]"
        raise InvalidInputError(msg)
    _check_frame_numbers("frame_positions", positions, frames, limit)
    _check_frame_numbers("frame_kinds", kinds, frames, len(FrameKind))
    return grid


def _check_frame_numbers(name: str, numbers: Tensor | None, frames: int, stop: int) -> None:
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
