"""Cost of the light decoder (`wan/light_decoder.py`), from its sizes. Arithmetic only.

Every latent frame costs the same, the first included: the frames that it does not show are needed as memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry
from swifti2v.memory.codec_cost import WanCodecDimensions
from swifti2v.memory.transformer_cost import TERA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.geometry import Size
    from swifti2v.memory.budget import PipelineDimensions

BLOCKS_PER_STAGE = 3


class _Convolution(NamedTuple):
    """Multiplications of one output cell, how far it is reduced in space, and how often it runs a latent frame."""

    weights: int
    reduction: int
    frames: int


@dataclass(frozen=True)
class LightDecoderDimensions:
    """A light decoder, by the names of `LightLayout`; the defaults are those of ``taew2_2``."""

    num_channels: int = 48
    widths: tuple[int, ...] = (256, 128, 64, 64)
    frame_factors: tuple[int, ...] = (1, 2, 2)
    patch_size: int = 2
    is_wide: bool = False

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along each side."""
        return self.patch_size << len(self.frame_factors)

    @property
    def num_parameters(self) -> int:
        """Weights, biases left out: they are a thousandth."""
        return sum(layer.weights for layer in self._convolutions())

    def decode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to decode a clip of `num_frames` pixel frames; raise `InvalidInputError` unless they divide."""
        num_latent_frames = CodecGeometry().latent_frames(num_frames)
        frame = sum(2 * layer.weights * layer.frames * _cells(size, layer.reduction) for layer in self._convolutions())
        return num_latent_frames * frame / TERA

    def remembered_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Bytes that stay from frame to frame: of each block the frame before."""
        return element_bytes * BLOCKS_PER_STAGE * sum(width * cells for width, _, cells in self._stages(size))

    def decode_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Peak bytes of decoding in a stream, beyond weights and what is handed out."""
        # A block beside its input twice over; the wide ones go through four times their width.
        block = max((10 if self.is_wide else 5) * width * cells for width, _, cells in self._stages(size))
        # The last layer: what it reads, enlarged, convolved and behind its ReLU.
        working = max(block, 3 * self.widths[-1] * _cells(size, self.patch_size))
        # Enlarged frames that wait for their turn, and pictures that wait until those of a latent frame are all there.
        waiting = sum(4 * (count - 1) * width * cells for width, count, cells in self._stages(size))
        pictures = 3 * size.width * size.height * prod(self.frame_factors)
        joined = (2 * element_bytes + 4) * pictures
        peak = max(element_bytes * (working + pictures), joined) + element_bytes * waiting
        return self.remembered_bytes(size, element_bytes=element_bytes) + peak

    def _stages(self, size: Size) -> Iterator[tuple[int, int, int]]:
        """Yield width, frames made of one, and cells of a frame, stage by stage."""
        for index, (width, count) in enumerate(zip(self.widths, self.frame_factors, strict=False)):
            yield width, count, _cells(size, self.spatial_factor >> index)

    def _convolutions(self) -> Iterator[_Convolution]:
        reduction, frames = self.spatial_factor, 1
        yield _Convolution((1 if self.is_wide else 9) * self.num_channels * self.widths[0], reduction, frames)
        for width, following, count in zip(self.widths, self.widths[1:], self.frame_factors, strict=False):
            block = 2 * 49 * width + 12 * width**2 if self.is_wide else 36 * width**2
            yield from (_Convolution(block, reduction, frames) for _ in range(BLOCKS_PER_STAGE))
            if self.is_wide:
                yield _Convolution(9 * width * 4 * following, reduction, frames)
                yield _Convolution(following * count * following, reduction // 2, frames)
            else:
                yield _Convolution(width * count * width, reduction, frames)
                yield _Convolution(9 * width * following, reduction // 2, frames * count)
            reduction, frames = reduction // 2, frames * count
        yield _Convolution(9 * self.widths[-1] * 3 * self.patch_size**2, reduction, frames)


def with_light_decoder(dimensions: PipelineDimensions) -> PipelineDimensions:
    """Return a pipeline that decodes with TAEHV's network for its latents.

    Raises:
        InvalidInputError: its codec is not Wan's.
    """
    codec = dimensions.stage_two_codec
    if not isinstance(codec, WanCodecDimensions):
        msg = "light decoders are for the latents of Wan's codecs, and this checkpoint has another; use decoder exact"
        raise InvalidInputError(msg)
    light = LightDecoderDimensions(codec.num_channels, patch_size=codec.spatial_factor // 8)
    return replace(dimensions, light_decoder=light)


def _cells(size: Size, reduction: int) -> int:
    return (size.width // reduction) * (size.height // reduction)
