"""The chunked codec gives the numbers of diffusers' own decode and encode, in little memory that does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size_networks import VAE22
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.live_bytes import LiveBytes, fused_attention
from swifti2v.wan.streaming import CodecSettings, WanStreamingCodec
from swifti2v.wan.tiling import Tiling
from swifti2v.wan.wan_chunked import ChunkedWanNetwork, can_run_chunked
from tests.wan.codec_streams import cut, whole_decode, whole_encode

GIB = 2**30
CONFIGS: dict[str, dict[str, Any]] = {
    # Widths that differ from block to block, as in the real codecs: 1, 2, 4, 4 times the base.
    "wan2.1": {"base_dim": 3, "z_dim": 16, "num_res_blocks": 2},
    "wan2.2": VAE22 | {"base_dim": 3, "decoder_base_dim": 5, "num_res_blocks": 1},
}


def codec_of(name: str, dtype: torch.dtype) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(dim_mult=[1, 2, 4, 4], **CONFIGS[name]).eval()
    for parameter in vae.parameters():  # norms of ones and biases of zero would hide that one is left out
        if parameter.ndim != 5:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return vae.to(dtype)


def decoded(vae: AutoencoderKLWan, latents: Tensor, settings: CodecSettings) -> Tensor:
    codec = WanStreamingCodec(vae, settings=settings)
    return torch.cat(list(codec.decode_pixel_stream(latents.split([1, 3, latents.shape[2] - 4], dim=2))), dim=2)


def encoded(vae: AutoencoderKLWan, clip: Tensor, settings: CodecSettings) -> Tensor:
    return torch.cat(list(WanStreamingCodec(vae, settings=settings).encode_stream(cut(clip))), dim=2)


@pytest.mark.parametrize("frames_per_step", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_streams_equal_diffusers_whole_decode_and_encode(name: str, dtype: torch.dtype, frames_per_step: int) -> None:
    vae = codec_of(name, dtype)
    factor = vae.config.scale_factor_spatial
    settings = CodecSettings(frames_per_step=frames_per_step)
    latents = torch.randn(1, vae.config.z_dim, 5, 2, 3)
    clip = torch.rand(1, 3, 13, 2 * factor, 3 * factor) * 2 - 1
    pixels, modes = whole_decode(vae, latents), whole_encode(vae, clip)
    # Seen here: bfloat16 equal bit by bit; float32 apart by 1e-5 where a convolution gets fewer frames at once.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(decoded(vae, latents, settings), pixels, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(encoded(vae, clip, settings), modes, rtol=tolerance, atol=2 * tolerance)
    assert pixels.std() > 0.01
    assert modes.std() > 0.01


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_tiles_and_offloaded_features_change_nothing_against_diffusers_modules(name: str, offloaded: bool) -> None:
    vae = codec_of(name, torch.float32)
    factor = vae.config.scale_factor_spatial
    tiling = Tiling(Size(3 * factor, 2 * factor), factor)
    latents = torch.randn(1, vae.config.z_dim, 6, 3, 5)
    clip = torch.rand(1, 3, 9, 3 * factor, 5 * factor) * 2 - 1
    plain = CodecSettings(tiling, chunked=False)
    chunked = CodecSettings(tiling, offload_features=offloaded)
    torch.testing.assert_close(decoded(vae, latents, chunked), decoded(vae, latents, plain), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(encoded(vae, clip, chunked), encoded(vae, clip, plain), rtol=1e-5, atol=2e-5)
    if offloaded:  # diffusers' own caches can be offloaded too
        both = CodecSettings(tiling, chunked=False, offload_features=True)
        assert torch.equal(decoded(vae, latents, both), decoded(vae, latents, plain))


def test_layers_that_cannot_be_passed_by_are_left_to_diffusers() -> None:
    vae = codec_of("wan2.1", torch.float32)
    assert can_run_chunked(vae)
    vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    assert not can_run_chunked(vae)
    vae = codec_of("wan2.1", torch.float32)
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert not can_run_chunked(vae)
    dropping = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, dropout=0.1)
    assert can_run_chunked(dropping.eval())
    assert not can_run_chunked(dropping.train())


def test_a_step_takes_at_least_one_frame() -> None:
    with pytest.raises(InvalidInputError, match="frames_per_step is 0"):
        CodecSettings(frames_per_step=0)


# ---- full size, on the meta device ----


@pytest.fixture(scope="module")
def full_size_vae() -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(dim_mult=[1, 2, 4, 4], **VAE22).eval().to(torch.bfloat16)


def peaks(vae: AutoencoderKLWan, settings: CodecSettings, direction: str) -> list[float]:
    """GiB at the peak of the first three and the first four latent frames of 2560x1408, weights left out."""
    codec = WanStreamingCodec(vae, settings=settings)
    latents = (torch.empty(1, 48, 1, 88, 160, device="meta") for _ in range(4))
    chunks = (torch.empty(1, 3, 4 if index else 1, 1408, 2560, device="meta") for index in range(4))
    found = []
    with fused_attention(), LiveBytes() as live:
        for item in codec.decode_pixel_stream(latents) if direction == "decode" else codec.encode_stream(chunks):
            del item
            found.append(live.peak_bytes / GIB)
    return found[2:]


QUARTERS = CodecSettings(Tiling(Size(1344, 768), 128), offload_features=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "decode_gib", "encode_gib"),
    [(CodecSettings(), 18.0, 10.2), (QUARTERS, 6.0, 3.3)],
    ids=["untiled", "2x2"],
)
def test_peaks_at_full_size_are_bounded_and_constant_in_length(
    full_size_vae: AutoencoderKLWan, settings: CodecSettings, decode_gib: float, encode_gib: float
) -> None:
    for direction, bound in (("decode", decode_gib), ("encode", encode_gib)):
        shorter, longer = peaks(full_size_vae, settings, direction)
        assert shorter == pytest.approx(longer, rel=1e-3)
        assert longer <= bound


def test_flops_are_those_of_diffusers_forward(full_size_vae: AutoencoderKLWan) -> None:
    latents, cache = torch.empty(1, 48, 2, 8, 12, device="meta", dtype=torch.bfloat16), {}
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        full_size_vae.decode(latents)
    network = ChunkedWanNetwork(full_size_vae)
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        for index, latent in enumerate(latents.split(1, dim=2)):
            network.decode(full_size_vae.post_quant_conv(latent), cache, first_chunk=index == 0)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
