"""Compute and live memory of each phase at full size, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import full_size_networks as networks
from swifti2v.memory.amounts import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers import AutoencoderKLWan

    from swifti2v.geometry import Size
    from swifti2v.wan.streaming import CodecSettings


@dataclass(frozen=True)
class Row:
    """One phase: what it computes and holds, and on a GPU how long it took."""

    name: str
    tflop: float
    peak_gib: float
    calls: int = 1
    seconds: float | None = None
    tflop_per_second: float | None = None
    roofline_share: float | None = None


def accounts(size: Size, *, baseline: bool, quantization: str = "none") -> list[Row]:
    """Count each phase of a run on the meta device, with the products of `quantization` in the transformers."""
    codec = networks.codec(networks.VAE22, "meta")
    rows = [
        _stage_one_row(size, quantization=quantization),
        *(_stage_two_row(size, frames, quantization=quantization) for frames in (4, 5)),
    ]
    for tiling in (None, (2, 2)):
        rows += _codec_rows(codec, size, tiling, num_chunks=3)
    rows += [_light_row(size, wide=wide, num_chunks=3) for wide in (False, True)]
    if baseline:
        rows += [_diffusers_stage_two_row(size, 5), *_diffusers_codec_rows(codec, size)]
    return rows


def _stage_one_row(size: Size, *, quantization: str = "none") -> Row:
    import torch

    from swifti2v.memory.budget import WAN22

    small = WAN22.reference_size(size)
    network = _quantized(networks.expert("meta"), quantization=quantization)
    with torch.device("meta"):
        latents = torch.empty(1, 36, 21, small.height // 8, small.width // 8, dtype=torch.bfloat16)
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        timestep = torch.empty(1)
    return _counted("Stage I, one forward", lambda: network(latents, timestep, text, return_dict=False))


def _window(size: Size, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    with torch.device("meta"):
        latents = torch.empty(1, 96, frames, size.height // 16, size.width // 16, dtype=torch.bfloat16)
        return latents, torch.empty(1, frames), torch.empty(1, 512, 4096, dtype=torch.bfloat16)


def _stage_two_row(size: Size, frames: int, *, quantization: str = "none") -> Row:
    network = _quantized(networks.stage_two("meta"), quantization=quantization)
    latents, timestep, text = _window(size, frames)
    return _counted(
        f"Stage II, one forward of {frames} frames", lambda: network(latents, timestep, text, return_dict=False)
    )


def _quantized(network: Any, *, quantization: Any) -> Any:
    from swifti2v.wan.quantized_linear import use_quantized_matmul

    use_quantized_matmul([network], quantization, device=network.device)
    return network


def _diffusers_stage_two_row(size: Size, frames: int) -> Row:
    network = networks.stage_two_of_diffusers("meta")
    latents, timestep, text = _window(size, frames)
    per_token = timestep.repeat_interleave((size.height // 32) * (size.width // 32), dim=1)
    return _counted(
        f"diffusers: Stage II per token, {frames} frames", lambda: network(latents, per_token, text, return_dict=False)
    )


def _counted(name: str, run: Callable[[], object]) -> Row:
    import torch

    from swifti2v.memory.live_bytes import accounted

    with torch.no_grad(), accounted() as account:
        run()
    return Row(name, account.tflop, account.peak_bytes / GIB)


def _codec_rows(codec: AutoencoderKLWan, size: Size, tiles: tuple[int, int] | None, num_chunks: int) -> list[Row]:
    """Encode and decode a few chunks; what a chunk costs does not depend on how many went before."""
    import torch

    from swifti2v.wan.streaming import WanStreamingCodec

    settings = _codec_settings(size, tiles)
    words = "untiled" if tiles is None else f"{tiles[0]}x{tiles[1]} tiles, parked"

    def decode() -> None:
        shape = (1, 48, 1, size.height // 16, size.width // 16)
        latents = (torch.empty(shape, device="meta") for _ in range(num_chunks))
        for frames in WanStreamingCodec(codec, settings=settings).decode_pixel_stream(latents):
            del frames

    def encode() -> None:
        lengths = (1, *(4 for _ in range(num_chunks - 1)))
        chunks = (torch.empty(1, 3, length, size.height, size.width, device="meta") for length in lengths)
        for latent in WanStreamingCodec(codec, settings=settings).encode_stream(chunks):
            del latent

    return [_counted(f"encode, {num_chunks} latent frames, {words}", encode),
            _counted(f"decode, {num_chunks} latent frames, {words}", decode)]  # fmt: skip


def _light_row(size: Size, *, wide: bool, num_chunks: int) -> Row:
    """Decode a few latent frames with a light decoder."""
    import torch

    decoder = networks.light_decoder("meta", wide=wide)

    def decode() -> None:
        shape = (1, 48, 1, size.height // 16, size.width // 16)
        for frames in decoder.decode_pixel_stream(torch.empty(shape, device="meta") for _ in range(num_chunks)):
            del frames

    return _counted(f"decode, {num_chunks} latent frames, light{', wide' * wide}", decode)


def _codec_settings(size: Size, tiles: tuple[int, int] | None) -> CodecSettings:
    from swifti2v.memory.ways import tile_size
    from swifti2v.wan.streaming import CodecSettings
    from swifti2v.wan.tiling import Tiling

    if tiles is None:
        return CodecSettings()
    return CodecSettings(Tiling(tile_size(size, *tiles, multiple=16)), offload_features=True)


def _diffusers_codec_rows(codec: AutoencoderKLWan, size: Size) -> list[Row]:
    import torch

    latents = torch.empty(1, 48, 3, size.height // 16, size.width // 16, device="meta", dtype=torch.bfloat16)
    clip = torch.empty(1, 3, 9, size.height, size.width, device="meta", dtype=torch.bfloat16)
    return [
        _counted("diffusers: encode, 3 latent frames", lambda: codec.encode(clip)),
        _counted("diffusers: decode, 3 latent frames", lambda: codec.decode(latents)),
    ]
