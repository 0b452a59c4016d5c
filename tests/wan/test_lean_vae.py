"""The lean codec gives the numbers of diffusers' own decode and encode, in little memory that does not grow."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.full_size_networks import VAE22
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.memory.live_bytes import accounted
from swifti2v.wan.lean_vae import LeanWanNetwork, is_lean_capable
from swifti2v.wan.tiling import Tiling
from swifti2v.wan.vae import CodecSettings, WanStreamingCodec

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def chunks_of(clip: Tensor) -> Iterator[Tensor]:
    geometry = CodecGeometry()
    for index in range(geometry.latent_frames(clip.shape[2])):
        frames = geometry.frames_of(index)
        yield clip[:, :, frames.start : frames.stop]


def decoded(vae: AutoencoderKLWan, latents: Tensor, settings: CodecSettings) -> Tensor:
    codec = WanStreamingCodec(vae, settings=settings)
    return torch.cat(list(codec.decode_pixel_stream(latents.split([1, 3, latents.shape[2] - 4], dim=2))), dim=2)


def encoded(vae: AutoencoderKLWan, clip: Tensor, settings: CodecSettings) -> Tensor:
    return torch.cat(list(WanStreamingCodec(vae, settings=settings).encode_stream(chunks_of(clip))), dim=2)


@pytest.mark.parametrize("frames_per_step", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_streams_equal_diffusers_whole_decode_and_encode(name: str, dtype: torch.dtype, frames_per_step: int) -> None:
    vae = codec_of(name, dtype)
    factor = vae.config.scale_factor_spatial
    settings = CodecSettings(frames_per_step=frames_per_step)
    latents = torch.randn(1, vae.config.z_dim, 5, 2, 3)
    clip = torch.rand(1, 3, 13, 2 * factor, 3 * factor) * 2 - 1
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.decode((latents * std + mean).to(dtype)).sample.float()
        modes = (vae.encode(clip.to(dtype)).latent_dist.mode().float() - mean) / std
    # Seen here: bfloat16 equal bit by bit; float32 apart by 1e-5 where a convolution gets fewer frames at once.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(decoded(vae, latents, settings), pixels, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(encoded(vae, clip, settings), modes, rtol=tolerance, atol=2 * tolerance)
    assert pixels.std() > 0.01
    assert modes.std() > 0.01


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_tiles_and_parked_features_change_nothing_against_diffusers_modules(name: str, parked: bool) -> None:
    vae = codec_of(name, torch.float32)
    factor = vae.config.scale_factor_spatial
    tiling = Tiling(Size(3 * factor, 2 * factor), factor)
    latents = torch.randn(1, vae.config.z_dim, 6, 3, 5)
    clip = torch.rand(1, 3, 9, 3 * factor, 5 * factor) * 2 - 1
    plain = CodecSettings(tiling, lean=False)
    lean = CodecSettings(tiling, park_features=parked)
    torch.testing.assert_close(decoded(vae, latents, lean), decoded(vae, latents, plain), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(encoded(vae, clip, lean), encoded(vae, clip, plain), rtol=1e-5, atol=2e-5)
    if parked:  # diffusers' own caches can be parked too
        both = CodecSettings(tiling, lean=False, park_features=True)
        assert torch.equal(decoded(vae, latents, both), decoded(vae, latents, plain))


def test_layers_that_cannot_be_passed_by_are_left_to_diffusers() -> None:
    vae = codec_of("wan2.1", torch.float32)
    assert is_lean_capable(vae)
    vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    assert not is_lean_capable(vae)
    vae = codec_of("wan2.1", torch.float32)
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert not is_lean_capable(vae)
    dropping = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, dropout=0.1)
    assert is_lean_capable(dropping.eval())
    assert not is_lean_capable(dropping.train())


def test_a_step_takes_at_least_one_frame() -> None:
    with pytest.raises(InvalidInputError, match="frames_per_step is 0"):
        CodecSettings(frames_per_step=0)


# ---- full size, on the meta device ----


@pytest.fixture(scope="module")
def full_size_vae() -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(dim_mult=[1, 2, 4, 4], **VAE22).eval().to(torch.bfloat16)


def decode_peaks(vae: AutoencoderKLWan, settings: CodecSettings, counts: tuple[int, ...]) -> list[float]:
    """GiB at the peak of decoding so many latent frames of 2560x1408, weights left out."""
    peaks = []
    for count in counts:
        codec = WanStreamingCodec(vae, settings=settings)
        latents = (torch.empty(1, 48, 1, 88, 160, device="meta") for _ in range(count))
        with accounted() as account:
            for frames in codec.decode_pixel_stream(latents):
                del frames
        peaks.append(account.peak_bytes / GIB)
    return peaks


def encode_peaks(vae: AutoencoderKLWan, settings: CodecSettings, counts: tuple[int, ...]) -> list[float]:
    peaks = []
    for count in counts:
        codec = WanStreamingCodec(vae, settings=settings)
        chunks = (torch.empty(1, 3, 4 if index else 1, 1408, 2560, device="meta") for index in range(count))
        with accounted() as account:
            for latent in codec.encode_stream(chunks):
                del latent
        peaks.append(account.peak_bytes / GIB)
    return peaks


QUARTERS = CodecSettings(Tiling(Size(1344, 768), 128), park_features=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "decode_gib", "encode_gib"),
    [(CodecSettings(), 18.0, 10.2), (QUARTERS, 6.0, 3.3)],
    ids=["untiled", "2x2"],
)
def test_peaks_at_full_size_are_bounded_and_constant_in_length(
    full_size_vae: AutoencoderKLWan, settings: CodecSettings, decode_gib: float, encode_gib: float
) -> None:
    for peaks, bound in (
        (decode_peaks(full_size_vae, settings, (3, 5)), decode_gib),
        (encode_peaks(full_size_vae, settings, (3, 5)), encode_gib),
    ):
        assert max(peaks) <= bound
        assert all(before == pytest.approx(after, rel=1e-3) for before, after in pairwise(peaks))


@pytest.mark.slow
def test_flops_are_those_of_diffusers_forward(full_size_vae: AutoencoderKLWan) -> None:
    network, cache = LeanWanNetwork(full_size_vae), {}
    with accounted() as account, torch.no_grad():
        for index in range(2):
            latent = torch.empty(1, 48, 1, 88, 160, device="meta", dtype=torch.bfloat16)
            network.decode(full_size_vae.post_quant_conv(latent), cache, first_chunk=index == 0)
    assert account.tflop == pytest.approx(82.90933 + 266.01738, rel=1e-6)  # counted for diffusers' own class
