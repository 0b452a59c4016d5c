"""A video codec that is fitted, not trained: temporal DCT times spatial KLT of 8x8x4-pixel blocks.

It stands in for the convolutional Wan VAE in the embedded model `mini`: linear, causal, streaming, at memory speed.
The four frames of a latent frame go through a 4-point DCT; each of the four temporal bands is an 8x8x3 block that a
basis of its own (the band's principal components) reduces to a few coefficients. Latent frame 0 is a still: it fills
the lowest band only, in the same basis and at the same scale as later frames, so that a network can compare them.
Separable costs nothing against a KLT of the whole 768-pixel block (`docs/log.md`, 2026-11-22).

Shape suffixes: B batch, C channels, F pixel frames, H W pixels, h w blocks, T band, P 8*8*3 pixels of a block.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from swifti2v.errors import InvalidInputError
from swifti2v.pixels import to_uint8

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BLOCK = 8
TEMPORAL = 4
BLOCK_NUMBERS = BLOCK * BLOCK * 3
STRIP_ROWS = 22


def temporal_dct() -> Tensor:
    """Orthonormal 4-point DCT-II, rows are bands: [4, 4] float32."""
    band = torch.arange(TEMPORAL, dtype=torch.float64)[:, None]
    frame = torch.arange(TEMPORAL, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (frame + 0.5) * band / TEMPORAL) * math.sqrt(2 / TEMPORAL)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def to_bands(frames_BCFHW: Tensor) -> Tensor:
    """Cut a chunk into blocks and bands: [B,3,f,H,W] -> [B,h,w,T,P]; f is 1 (a still: band 0 only, times 2) or 4."""
    batch, _, num_frames, height, width = frames_BCFHW.shape
    if num_frames not in {1, TEMPORAL} or height % BLOCK or width % BLOCK:
        msg = (
            f"a chunk of {num_frames} frames of {width}x{height} cannot be cut into blocks; "
            f"pass 1 or {TEMPORAL} frames whose sides are multiples of {BLOCK}"
        )
        raise InvalidInputError(msg)
    blocks = frames_BCFHW.reshape(batch, 3, num_frames, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    blocks_BhwFP = blocks.permute(0, 3, 5, 2, 4, 6, 1).flatten(4)
    if num_frames == 1:
        still = torch.zeros_like(blocks_BhwFP).repeat(1, 1, 1, TEMPORAL, 1)
        still[..., 0, :] = blocks_BhwFP[..., 0, :] * math.sqrt(TEMPORAL)
        return still
    return temporal_dct().to(blocks_BhwFP) @ blocks_BhwFP


def from_bands(bands_BhwTP: Tensor, num_frames: int) -> Tensor:
    """Invert `to_bands`: [B,h,w,T,P] -> [B,3,f,H,W] with f = `num_frames` in {1, 4}."""
    batch, rows, columns = bands_BhwTP.shape[:3]
    if num_frames == 1:
        blocks_BhwFP = bands_BhwTP[..., :1, :] / math.sqrt(TEMPORAL)
    else:
        blocks_BhwFP = temporal_dct().to(bands_BhwTP).T @ bands_BhwTP
    blocks = torch.unflatten(blocks_BhwFP, 4, (BLOCK, BLOCK, 3)).permute(0, 6, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, 3, num_frames, rows * BLOCK, columns * BLOCK)


def _strips(num_rows: int) -> Iterator[slice]:
    """Cut the rows of blocks into strips: the arithmetic takes several copies of its pixels, 173 MB each at 2K."""
    for start in range(0, num_rows, STRIP_ROWS):
        yield slice(start, min(start + STRIP_ROWS, num_rows))


class BlockTransform(nn.Module):
    """Chunk of pixels <-> coefficients, with an orthonormal basis for each temporal band.

    Args:
        band_channels: principal components kept of each of the four temporal bands; their sum is the channel count C.
    """

    basis: Tensor
    mean: Tensor

    def __init__(self, band_channels: Sequence[int]) -> None:
        super().__init__()
        if len(band_channels) != TEMPORAL or any(not 0 <= count <= BLOCK_NUMBERS for count in band_channels):
            msg = f"band_channels {tuple(band_channels)} must be {TEMPORAL} numbers in 0..{BLOCK_NUMBERS}"
            raise InvalidInputError(msg)
        self.band_channels = tuple(band_channels)
        self.register_buffer("basis", torch.zeros(BLOCK_NUMBERS, sum(self.band_channels)))
        self.register_buffer("mean", torch.zeros(BLOCK_NUMBERS))

    @property
    def num_channels(self) -> int:
        """Coefficients of a block, over all bands."""
        return sum(self.band_channels)

    def analyse(self, frames_BCFHW: Tensor) -> Tensor:
        """[B,3,f,H,W] -> [B,C,1,h,w]; for f = 1 the channels of bands 1..3 are zero."""
        batch, _, _, height, width = frames_BCFHW.shape
        shape = (batch, self.num_channels, 1, height // BLOCK, width // BLOCK)
        coefficients = torch.empty(shape, dtype=frames_BCFHW.dtype, device=frames_BCFHW.device)
        for rows in _strips(height // BLOCK):
            pixels = slice(rows.start * BLOCK, rows.stop * BLOCK)
            coefficients[..., rows, :] = self._analyse_strip(frames_BCFHW[..., pixels, :])
        return coefficients

    def _analyse_strip(self, frames_BCFHW: Tensor) -> Tensor:
        bands_BhwTP = to_bands(frames_BCFHW)
        bands_BhwTP[..., 0, :] -= self.mean.to(bands_BhwTP)
        bases = torch.split(self.basis.to(bands_BhwTP), list(self.band_channels), dim=1)
        coefficients = torch.cat([bands_BhwTP[..., band, :] @ basis for band, basis in enumerate(bases)], dim=-1)
        return coefficients.permute(0, 3, 1, 2).unsqueeze(2)

    def synthesise(self, coefficients_BC1hw: Tensor, num_frames: int) -> Tensor:
        """[B,C,1,h,w] -> [B,3,f,H,W] with f = `num_frames` in {1, 4}."""
        batch, _, _, height, width = coefficients_BC1hw.shape
        shape = (batch, 3, num_frames, height * BLOCK, width * BLOCK)
        frames = torch.empty(shape, dtype=coefficients_BC1hw.dtype, device=coefficients_BC1hw.device)
        for rows in _strips(height):
            pixels = slice(rows.start * BLOCK, rows.stop * BLOCK)
            frames[..., pixels, :] = self._synthesise_strip(coefficients_BC1hw[..., rows, :], num_frames)
        return frames

    def _synthesise_strip(self, coefficients_BC1hw: Tensor, num_frames: int) -> Tensor:
        coefficients = coefficients_BC1hw.squeeze(2).permute(0, 2, 3, 1)
        bases = torch.split(self.basis.to(coefficients), list(self.band_channels), dim=1)
        parts = torch.split(coefficients, list(self.band_channels), dim=-1)
        bands_BhwTP = torch.stack([part @ basis.T for part, basis in zip(parts, bases, strict=True)], dim=3)
        bands_BhwTP[..., 0, :] += self.mean.to(bands_BhwTP)
        return from_bands(bands_BhwTP, num_frames)


class BlockTransformCodec(ModelMixin, ConfigMixin):
    """The codec of Stage II in `mini`; a `StreamingCodec` (`wan/streaming.py`).

    Latents are coefficients over `scale`, float32. Made by `mini/fitting.py`.

    Args:
        band_channels: see `BlockTransform`; (80, 43, 37, 32) keeps 192 of 768 numbers, 46.9 dB on clips not seen.
    """

    config_name = "config.json"
    scale: Tensor

    @register_to_config
    def __init__(self, band_channels: tuple[int, int, int, int] = (80, 43, 37, 32)) -> None:
        super().__init__()
        self.transform = BlockTransform(band_channels)
        self.register_buffer("scale", torch.ones(self.transform.num_channels))

    @property
    def num_channels(self) -> int:
        """Latent channels."""
        return self.transform.num_channels

    spatial_factor = BLOCK
    temporal_factor = TEMPORAL

    @torch.no_grad()
    def encode_chunk(self, frames_BCFHW: Tensor) -> Tensor:
        """Encode one chunk, [B,3,f,H,W] in [-1,1] with f in {1, 4} -> [B,C,1,h,w] float32. Chunks are independent."""
        return self.transform.analyse(frames_BCFHW.to(self.scale)) / self.scale.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def decode_frame(self, latent_BC1hw: Tensor, *, first: bool) -> Tensor:
        """Decode one latent frame, [B,C,1,h,w] -> [B,3,f,H,W], f = 1 if `first` else 4; not clamped."""
        coefficients = latent_BC1hw.to(self.scale) * self.scale.view(1, -1, 1, 1, 1)
        return self.transform.synthesise(coefficients, 1 if first else TEMPORAL)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """[1,3,f,H,W] chunks of 1, 4, 4, ... frames -> [1,C,1,h,w] latents, one a chunk."""
        source = iter(chunks)
        for index in itertools.count():  # `enumerate` would hold on to its last item
            if (chunk := next(source, None)) is None:
                return
            expected = 1 if index == 0 else TEMPORAL
            if chunk.shape[2] != expected:
                msg = f"chunk {index} holds {chunk.shape[2]} frames; it must hold {expected} (1, then {TEMPORAL} each)"
                raise InvalidInputError(msg)
            latent = self.encode_chunk(chunk)
            del chunk  # 231 MB at 2560x1408, which would live on while whoever reads this is at work
            yield latent

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """[1,C,n,h,w] latents -> uint8 [f,H,W,3] on the CPU, one a latent frame (f = 1, 4, 4, ...)."""
        first = True
        for latent in latents:
            for frame in torch.split(latent, 1, dim=2):
                yield to_uint8(self.decode_frame(frame, first=first))
                first = False
            del latent, frame
