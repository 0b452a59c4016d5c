"""What a configuration of `StageTwoTransformer` must satisfy."""

from __future__ import annotations

from typing import Literal, get_args

from swifti2v.errors import ConfigurationError

PredictionType = Literal["velocity", "residual"]


def check_configuration(
    patch_size: tuple[int, ...], in_channels: int, out_channels: int, reference_channels: int, prediction_type: str
) -> None:
    """Raise `ConfigurationError` unless channels add up, the patch is flat in time and the prediction is known."""
    if reference_channels < 0 or in_channels != out_channels + reference_channels:
        msg = (
            f"in_channels is {in_channels}, not out_channels {out_channels} + reference_channels {reference_channels}; "
            "set reference_channels to the channels behind the slots"
        )
        raise ConfigurationError(msg)
    if len(patch_size) != 3 or patch_size[0] != 1:
        msg = f"patch_size is {tuple(patch_size)}; Stage II counts latent frames, so the first must be 1 of three"
        raise ConfigurationError(msg)
    if prediction_type not in get_args(PredictionType):
        msg = f"prediction_type is {prediction_type!r}; use one of {', '.join(get_args(PredictionType))}"
        raise ConfigurationError(msg)
