"""What a streaming codec refuses, and that the message says where it is and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.wan.streaming import WanStreamingCodec
from swifti2v.wan.tiling import Tiling

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(1, 3, 4, 32, 48)], "chunk 0 has 4 frames instead of 1; cut the clip into chunks of 1, 4, 4"),
        ([(1, 3, 1, 32, 48), (1, 3, 1, 32, 48)], "chunk 1 has 1 frames instead of 4"),
        ([(1, 3, 1, 32, 48), (1, 3, 4, 32, 48), (1, 3, 3, 32, 48)], "chunk 2 has 3 frames instead of 4"),
        ([(1, 3, 1, 40, 48)], "48x40; give width and height in multiples of 16"),
        ([(1, 3, 1, 0, 48)], "48x0; give width and height in multiples of 16"),
        ([(1, 3, 1, 32, 48), (1, 3, 4, 48, 32)], "chunk 1 is 32x48 but the stream began with 48x32"),
        ([(2, 3, 1, 32, 48)], r"shape \[2, 3, 1, 32, 48\]"),
        ([(1, 4, 1, 32, 48)], "give float pixels"),
        ([(3, 1, 32, 48)], "give float pixels"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(
    tiny_vae22: AutoencoderKLWan, shapes: list[tuple[int, ...]], match: str
) -> None:
    stream = WanStreamingCodec(tiny_vae22).encode_stream(torch.zeros(shape) for shape in shapes)
    for _ in shapes[1:]:
        next(stream)
    with pytest.raises(InvalidInputError, match=match):
        next(stream)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(1, 16, 1, 2, 3)], r"give normalised floats \[1, 48, frames"),
        ([(2, 48, 1, 2, 3)], r"shape \[2, 48, 1, 2, 3\]"),
        ([(1, 48, 0, 2, 3)], r"shape \[1, 48, 0, 2, 3\]"),
        ([(48, 1, 2, 3)], "cannot be decoded"),
        ([(1, 48, 1, 2, 3), (1, 48, 1, 3, 2)], "latent frame 1 is 2x3 but the stream began with 3x2"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    tiny_vae22: AutoencoderKLWan, shapes: list[tuple[int, ...]], match: str
) -> None:
    stream = WanStreamingCodec(tiny_vae22).decode_stream(torch.zeros(shape) for shape in shapes)
    for _ in shapes[1:]:
        next(stream)
    with pytest.raises(InvalidInputError, match=match):
        next(stream)


def test_integers_are_refused(tiny_vae21: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(tiny_vae21)
    with pytest.raises(InvalidInputError, match=r"torch\.uint8 cannot be encoded"):
        next(codec.encode_stream([torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8)]))
    with pytest.raises(InvalidInputError, match=r"torch\.int64 cannot be decoded"):
        next(codec.decode_stream([torch.zeros(1, 16, 1, 2, 2, dtype=torch.int64)]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_input_that_is_not_finite_is_refused_with_its_place(tiny_vae21: AutoencoderKLWan, value: float) -> None:
    codec = WanStreamingCodec(tiny_vae21)
    latents, clip = torch.zeros(1, 16, 3, 2, 3), torch.zeros(1, 3, 9, 16, 24)
    latents[0, 3, 1, 0, 0] = value
    clip[0, 1, 7, 3, 3] = value
    stream = codec.decode_stream([latents])
    next(stream)
    with pytest.raises(InvalidInputError, match="latent frame 1 holds NaN or infinity"):
        next(stream)
    with pytest.raises(InvalidInputError, match="pixel chunk 2 holds NaN or infinity"):
        list(codec.encode_stream(clip.split([1, 4, 4], dim=2)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale_factor_spatial": 8}, "scale_factor_spatial = 8, but its network has 16"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal = 8, but its network has 4"),
        ({"latents_mean": [0.0] * 16}, "length of latents_mean = 16, but its network has 48"),
        ({"latents_std": [0.0] * 48}, "latents_std that is not positive"),
    ],
)
def test_a_configuration_that_contradicts_the_network_is_refused(
    tiny_vae22: AutoencoderKLWan, change: dict[str, Any], match: str
) -> None:
    tiny_vae22.register_to_config(**change)
    with pytest.raises(CheckpointError, match=match):
        WanStreamingCodec(tiny_vae22)


def test_tiles_must_be_whole_latent_cells(tiny_vae22: AutoencoderKLWan) -> None:
    with pytest.raises(InvalidInputError, match="tile width of 36 pixels is not a multiple"):
        WanStreamingCodec(tiny_vae22, tiling=Tiling(Size(36, 32), 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_network_that_overflows_is_an_error(tiny_vae21: AutoencoderKLWan, dtype: torch.dtype) -> None:
    with torch.no_grad():
        tiny_vae21.decoder.conv_out.bias.fill_(torch.inf)
        tiny_vae21.quant_conv.bias.fill_(torch.nan)
    codec = WanStreamingCodec(tiny_vae21.to(dtype))
    with pytest.raises(CheckpointError, match=rf"{dtype} made values that are not finite.*latent frame 0; load it in"):
        next(codec.decode_stream([torch.zeros(1, 16, 1, 2, 3)]))
    with pytest.raises(CheckpointError, match="not finite from the pixels"):
        next(codec.encode_stream([torch.zeros(1, 3, 1, 16, 24)]))
