"""Other decoders of finished latents than Stage II's codec: the light one, or the codec on another device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swifti2v.errors import InvalidInputError
from swifti2v.wan.streaming import WanStreamingCodec
from swifti2v.wan.taehv import LightDecoder, decoder_from_weights, read_light_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch
    from torch import Tensor

    from swifti2v.wan.streaming import StreamingCodec

PUBLIC_WEIGHTS = {48: "lightx2v/Autoencoders/taew2_2.safetensors", 16: "lightx2v/Autoencoders/taew2_1.safetensors"}
"""TAEHV's decoders by the channels of the codec whose latents they take: Wan2.2's and Wan2.1's."""

TRAINED_ON_UNSCALED = "lighttae"
"""Start of the names of LightX2V's own files, which take latents that are not normalized, unlike TAEHV's."""


def open_light_decoder(
    config: Mapping[str, Any],
    weights: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    local_files_only: bool = False,
) -> LightDecoder:
    """Load a light decoder for the latents of a codec.

    Args:
        config: of the codec.
        weights: see `read_light_weights`; None: the public file for this codec.
        device: of the decoder.
        dtype: of its weights.
        local_files_only: never ask the network.

    Raises:
        InvalidInputError: the codec is not Wan's, or the decoder is for the latents of another one.
        CheckpointError: the weights cannot be found or read.
    """
    name = config.get("_class_name")
    if name != "AutoencoderKLWan":
        msg = f"light decoders are for the latents of Wan's codecs, and this checkpoint has a {name}; use decoder exact"
        raise InvalidInputError(msg)
    channels = config["z_dim"]
    if weights is None and channels not in PUBLIC_WEIGHTS:
        msg = f"no light decoder is known for latents of {channels} channels; give its weights, or use decoder exact"
        raise InvalidInputError(msg)
    source = weights or PUBLIC_WEIGHTS[channels]
    found = read_light_weights(source, local_files_only=local_files_only)
    network = decoder_from_weights(found, dtype=dtype).to(device)
    statistics = {}
    if Path(source).name.startswith(TRAINED_ON_UNSCALED):
        statistics = {"mean": config["latents_mean"], "std": config["latents_std"]}
    decoder = LightDecoder(network, **statistics)
    given = (decoder.num_channels, decoder.spatial_factor, decoder.temporal_factor)
    wanted = (channels, config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4))
    if given != wanted:
        msg = (
            f"the light decoder {source} is for latents of {given[0]} channels, {given[1]} pixels and {given[2]} "
            f"frames a cell, those of this checkpoint have {wanted[0]}, {wanted[1]} and {wanted[2]}; give its own file"
        )
        raise InvalidInputError(msg)
    return decoder


def decoder_elsewhere(codec: StreamingCodec, device: torch.device) -> WanStreamingCodec:
    """Return a codec with its own copy of the weights on `device`, so that it decodes while Stage II is at work.

    Raises:
        InvalidInputError: the codec is not Wan's.
    """
    if not isinstance(codec, WanStreamingCodec):
        msg = f"a {type(codec).__name__} decodes where the denoising runs; leave the device of the decoder out"
        raise InvalidInputError(msg)
    return WanStreamingCodec(copy.deepcopy(codec.vae).to(device), settings=codec.settings)


class Undecoded:
    """Replaces the decoder in processes that only share the denoising: reads latents, makes no frames."""

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Read all of `latents` and yield nothing."""
        for item in latents:
            del item
        yield from ()
