"""Clips and latents, coded as streams and by diffusers' own codec as a whole."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swifti2v.geometry import CodecGeometry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import AutoencoderKLWan

    from swifti2v.wan.streaming import StreamingCodec, WanStreamingCodec


def smooth_clip(num_frames: int, height: int, width: int) -> Tensor:
    """Slow waves, ``[1, 3, F, H, W]`` in [-0.9, 0.9]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    waves = [
        torch.stack([torch.sin(3 * x + 2 * y + t), torch.cos(2 * y - x + t), torch.sin(2 * x * y - t)])
        for t in torch.arange(num_frames) / 10
    ]
    return torch.stack(waves, 1)[None] * 0.9


def clip_for(vae: AutoencoderKLWan, num_frames: int = 9, rows: int = 2, columns: int = 3) -> Tensor:
    factor = vae.config.scale_factor_spatial
    return smooth_clip(num_frames, rows * factor, columns * factor)


def cut(clip: Tensor) -> Iterator[Tensor]:
    """Chunks of 1, 4, 4, ... frames."""
    geometry = CodecGeometry()
    for index in range(geometry.latent_frames(clip.shape[2])):
        frames = geometry.frames_of(index)
        yield clip[:, :, frames.start : frames.stop].clone()


def latents_for(vae: AutoencoderKLWan, num_latent_frames: int = 3, rows: int = 2, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, vae.config.z_dim, num_latent_frames, rows, columns, generator=generator)


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)


@contextmanager
def convolved_by_frame(vae: AutoencoderKLWan) -> Iterator[None]:
    """Let the 1x1x1 convolutions of a whole clip work a frame at a time, as in a stream.

    They are all that diffusers runs over the whole clip at once, and on some CPUs (seen: AVX2) the rounding of a
    convolution depends on the length of its input.
    """

    def by_frame(convolve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([convolve(frame) for frame in x.split(1, dim=2)], dim=2)

    convolutions = (vae.quant_conv, vae.post_quant_conv)
    for convolution in convolutions:
        convolution.forward = by_frame(convolution.forward)
    yield
    for convolution in convolutions:
        del convolution.forward


@torch.no_grad()
def whole_encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return (vae.encode(clip.to(vae.dtype)).latent_dist.mode().float() - mean) / std


@torch.no_grad()
def whole_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float()


def encode(codec: StreamingCodec, clip: Tensor) -> Tensor:
    return torch.cat(list(codec.encode_stream(cut(clip))), dim=2)


def decode(codec: WanStreamingCodec, latents: Tensor) -> Tensor:
    return torch.cat(list(codec.decode_pixel_stream(latents.split(1, dim=2))), dim=2)


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Decibels below the range that `expected` spans."""
    peak = expected.max() - expected.min()
    return float(10 * torch.log10(peak**2 / (actual - expected).square().mean()))
