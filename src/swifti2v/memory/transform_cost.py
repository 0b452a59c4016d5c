"""Cost of the embedded model's fitted codecs (`mini/transform_codec.py`, `mini/motion_codec.py`). Arithmetic only.

Only matrix products count. Optical flow and warping, most of the time of the motion codec, are pointwise work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from swifti2v.geometry import CodecGeometry
from swifti2v.memory.transformer_cost import TERA, config_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.geometry import Size

BLOCK = 8
BLOCK_NUMBERS = 3 * BLOCK**2


@dataclass(frozen=True)
class BlockTransformDimensions:
    """A linear space-time transform: one basis for each temporal band of an 8x8x4-pixel block.

    Args:
        band_channels: coefficients kept of each band.
    """

    band_channels: tuple[int, ...]
    spatial_factor: int = BLOCK

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json`, leaving other keys alone; raise `ConfigurationError` if a value is missing."""
        return cls(band_channels=tuple(config_value(config, "band_channels")))

    @property
    def num_channels(self) -> int:
        """Channels of a latent."""
        return sum(self.band_channels)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return len(self.band_channels)

    @property
    def num_parameters(self) -> int:
        """Bases, the mean block and a scale for each channel."""
        return BLOCK_NUMBERS * (self.num_channels + 1) + self.num_channels

    def encode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to encode a clip of `num_frames` pixel frames; raise `InvalidInputError` unless they divide."""
        later_chunks = CodecGeometry(temporal=self.temporal_factor).latent_frames(num_frames) - 1
        return self.still_tflop(size) + later_chunks * self.chunk_tflop(size)

    def decode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to decode a clip of `num_frames` pixel frames: the same matrices, transposed."""
        return self.encode_tflop(size, num_frames)

    def still_tflop(self, size: Size) -> float:
        """TFLOP of the first latent frame: every basis, no transform along time."""
        return 2 * _blocks(size) * BLOCK_NUMBERS * self.num_channels / TERA

    def chunk_tflop(self, size: Size) -> float:
        """TFLOP of a later latent frame."""
        return 2 * _blocks(size) * BLOCK_NUMBERS * (self.num_channels + self.temporal_factor**2) / TERA

    def encode_bytes(self, size: Size, *, element_bytes: int = 4) -> int:
        """Peak bytes of one chunk: its pixels, its blocks and its bands."""
        return element_bytes * size.width * size.height * self.temporal_factor * 3 * 3

    def decode_bytes(self, size: Size, *, element_bytes: int = 4) -> int:
        """Peak bytes of one chunk: its bands, its blocks and its pixels."""
        return self.encode_bytes(size, element_bytes=element_bytes)


@dataclass(frozen=True)
class MotionCodecDimensions:
    """Block motion to frame 0 and the transformed residual; frame 0 itself has a transform of its own.

    Args:
        image_channels: coefficients kept of frame 0.
        residual_band_channels: coefficients kept of the residual, by temporal band.
    """

    image_channels: int
    residual_band_channels: tuple[int, ...]
    spatial_factor: int = BLOCK

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json`, leaving other keys alone; raise `ConfigurationError` if a value is missing."""
        bands = tuple(config_value(config, "residual_band_channels"))
        return cls(image_channels=config_value(config, "image_channels"), residual_band_channels=bands)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return len(self.residual_band_channels)

    @property
    def num_channels(self) -> int:
        """Channels of a latent: x and y of the motion of each frame, and the coefficients."""
        return 2 * self.temporal_factor + self.image_channels

    @property
    def _image(self) -> BlockTransformDimensions:
        return BlockTransformDimensions((self.image_channels, 0, 0, 0))

    @property
    def _residual(self) -> BlockTransformDimensions:
        return BlockTransformDimensions(self.residual_band_channels)

    @property
    def num_parameters(self) -> int:
        """Bases and means of both transforms."""
        return BLOCK_NUMBERS * (self.image_channels + sum(self.residual_band_channels) + 2)

    def encode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to encode a clip of `num_frames` pixel frames; frame 0 is decoded too, to warp what was kept of it."""
        later_chunks = CodecGeometry(temporal=self.temporal_factor).latent_frames(num_frames) - 1
        return 2 * self._image.still_tflop(size) + later_chunks * self._residual.chunk_tflop(size)

    def decode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to decode a clip of `num_frames` pixel frames; raise `InvalidInputError` unless they divide."""
        later_chunks = CodecGeometry(temporal=self.temporal_factor).latent_frames(num_frames) - 1
        return self._image.still_tflop(size) + later_chunks * self._residual.chunk_tflop(size)

    def encode_bytes(self, size: Size, *, element_bytes: int = 4) -> int:
        """Peak bytes of one chunk: its pixels, the warped ones, their blocks and bands."""
        return element_bytes * size.width * size.height * self.temporal_factor * 3 * 4

    def decode_bytes(self, size: Size, *, element_bytes: int = 4) -> int:
        """Peak bytes of one chunk: bands, blocks, the warped pixels and their sum."""
        return self.encode_bytes(size, element_bytes=element_bytes)


def _blocks(size: Size) -> int:
    return (size.width // BLOCK) * (size.height // BLOCK)
