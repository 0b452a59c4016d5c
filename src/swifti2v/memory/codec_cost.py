"""Cost of the video codecs, layer by layer from the numbers of their `config.json`. Arithmetic only.

A causal Wan codec runs chunk by chunk: the first latent frame from one pixel frame, every later one from four. A layer
is known by its channels, by how far its input is reduced in space, and by the frames it makes in a first and in a
later chunk; FLOPs, parameters and feature caches are sums over the layers. The tests hold them against the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from swifti2v.geometry import CodecGeometry
from swifti2v.memory.transformer_cost import TERA, config_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from swifti2v.geometry import Size


class CodecCost(Protocol):
    """What a plan asks of a codec."""

    @property
    def num_channels(self) -> int:
        """Channels of a latent."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along each side."""

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""

    @property
    def num_parameters(self) -> int:
        """Weights of both halves."""

    def encode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to encode a clip of `num_frames` pixel frames."""

    def decode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to decode a clip of `num_frames` pixel frames."""

    def encode_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Peak bytes of encoding in a stream, beyond weights and input."""

    def decode_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Peak bytes of decoding in a stream, beyond weights and output."""


class _Layer(NamedTuple):
    """One convolution; `reduction` counts pixels per output cell along a side.

    Args:
        kernel: volume of the kernel.
        inputs, outputs: channels.
        first_frames, later_frames: output frames in the first and in a later chunk.
        cached_frames: input frames kept for the next chunk, of `cached_frames * inputs` channels per cell.
        after_norm: a norm with one weight per input channel stands before it.
        attention: it is the query-key-value projection of single-head attention over a frame.
    """

    kernel: int
    inputs: int
    outputs: int
    reduction: int
    first_frames: int
    later_frames: int
    cached_frames: int = 0
    after_norm: bool = False
    attention: bool = False

    @property
    def num_parameters(self) -> int:
        return (self.kernel * self.inputs + 1) * self.outputs + (self.inputs if self.after_norm else 0)

    def flop(self, size: Size, frames: int) -> int:
        cells = (size.width // self.reduction) * (size.height // self.reduction)
        attention = 4 * cells**2 * self.inputs if self.attention else 0
        return frames * (2 * self.kernel * self.inputs * self.outputs * cells + attention)

    def cache_elements(self, size: Size) -> int:
        return self.cached_frames * self.inputs * (size.width // self.reduction) * (size.height // self.reduction)


class _Frames(NamedTuple):
    first: int
    later: int


@dataclass(frozen=True)
class WanCodecDimensions:
    """A Wan VAE, by the names of diffusers' `AutoencoderKLWan` config (`temperal_downsample` is spelt as there)."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 1
    is_residual: bool = False
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json`, leaving other keys alone; raise `ConfigurationError` if a value is missing."""
        base_dim = config_value(config, "base_dim")
        return cls(
            base_dim=base_dim,
            decoder_base_dim=config.get("decoder_base_dim") or base_dim,
            z_dim=config_value(config, "z_dim"),
            in_channels=config_value(config, "in_channels", 3),
            out_channels=config_value(config, "out_channels", 3),
            patch_size=config.get("patch_size") or 1,
            is_residual=config_value(config, "is_residual", False),
            dim_mult=tuple(config_value(config, "dim_mult", (1, 2, 4, 4))),
            num_res_blocks=config_value(config, "num_res_blocks", 2),
            temperal_downsample=tuple(config_value(config, "temperal_downsample", (False, True, True))),
        )

    @property
    def num_channels(self) -> int:
        """Channels of a latent."""
        return self.z_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along each side."""
        return self.patch_size << (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 1 << sum(self.temperal_downsample)

    @property
    def encoder_parameters(self) -> int:
        """Weights of the encoding half, its closing 1x1x1 convolution included."""
        return sum(layer.num_parameters for layer in self._encoder())

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoding half, its opening 1x1x1 convolution included."""
        return sum(layer.num_parameters for layer in self._decoder())

    @property
    def num_parameters(self) -> int:
        """Weights of both halves."""
        return self.encoder_parameters + self.decoder_parameters

    def encode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to encode a clip of `num_frames` pixel frames; raise `InvalidInputError` unless they divide."""
        return self._tflop(self._encoder(), size, num_frames)

    def decode_tflop(self, size: Size, num_frames: int) -> float:
        """TFLOP to decode a clip of `num_frames` pixel frames; raise `InvalidInputError` unless they divide."""
        return self._tflop(self._decoder(), size, num_frames)

    def encode_cache_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Bytes of features that encoding keeps from chunk to chunk."""
        return element_bytes * sum(layer.cache_elements(size) for layer in self._encoder())

    def decode_cache_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Bytes of features that decoding keeps from chunk to chunk."""
        return element_bytes * sum(layer.cache_elements(size) for layer in self._decoder())

    def encode_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Peak bytes of encoding in a stream with the modules of diffusers, untiled: caches and the worst block."""
        working = element_bytes * self._working_elements(self.encoder_blocks(), size)
        return working + self.encode_cache_bytes(size, element_bytes=element_bytes)

    def decode_bytes(self, size: Size, *, element_bytes: int = 2) -> int:
        """Peak bytes of decoding in a stream with the modules of diffusers, untiled: caches and the worst block."""
        working = element_bytes * self._working_elements(self.decoder_blocks(), size)
        return working + self.decode_cache_bytes(size, element_bytes=element_bytes)

    def _tflop(self, layers: Iterator[_Layer], size: Size, num_frames: int) -> float:
        later_chunks = CodecGeometry(temporal=self.temporal_factor).latent_frames(num_frames) - 1
        return sum(layer.flop(size, layer.first_frames + later_chunks * layer.later_frames) for layer in layers) / TERA

    def _working_elements(self, blocks: Iterator[CodecBlock], size: Size) -> int:
        """Elements alive beside the caches while the widest residual block normalises.

        A norm holds its input twice in fp32, the size of four bf16 tensors. Beside them live the block's input with the
        copy that its shortcut needs (residual codecs), the resnet's own shortcut and its input.
        """
        copies = 2 if self.is_residual else 1

        def alive(block: CodecBlock) -> int:
            entry = copies * block.inputs + (block.outputs if block.inputs != block.outputs else 0) + 4 * block.inputs
            inside = copies * block.inputs + 2 * block.outputs + 4 * block.outputs
            cells = (size.width // block.reduction) * (size.height // block.reduction)
            return max(entry, inside) * cells * block.frames.later

        return max(alive(block) for block in blocks)

    def encoder_blocks(self) -> Iterator[CodecBlock]:
        """Yield the blocks of the encoding half in order, from pixels to latents."""
        widths = [self.base_dim * factor for factor in (1, *self.dim_mult)]
        reduction, later = self.patch_size, self.temporal_factor
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            yield CodecBlock(inputs, outputs, reduction, _Frames(1, later))
            if index < len(self.dim_mult) - 1:
                reduction *= 2
                later //= 2 if self.temperal_downsample[index] else 1

    def decoder_blocks(self) -> Iterator[CodecBlock]:
        """Yield the blocks of the decoding half in order, from latents to pixels."""
        widths = [self.decoder_base_dim * factor for factor in (self.dim_mult[-1], *reversed(self.dim_mult))]
        upsampled = tuple(reversed(self.temperal_downsample))
        reduction, later = self.spatial_factor, 1
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            # Wan2.1 halves the channels while upsampling, Wan2.2 does not.
            yield CodecBlock(
                inputs if self.is_residual or index == 0 else inputs // 2, outputs, reduction, _Frames(1, later)
            )
            if index < len(self.dim_mult) - 1:
                reduction //= 2
                later *= 2 if upsampled[index] else 1

    def _encoder(self) -> Iterator[_Layer]:
        blocks = tuple(self.encoder_blocks())
        start, end = blocks[0], blocks[-1]
        yield _causal(self.in_channels, start.inputs, start.reduction, start.frames)
        for index, block in enumerate(blocks):
            yield from _resnets(block, self.num_res_blocks)
            if block is not end:
                width, reduction, frames = block.outputs, 2 * block.reduction, block.frames
                yield _Layer(9, width, width, reduction, *frames)
                if self.temperal_downsample[index]:
                    yield _Layer(3, width, width, reduction, 0, frames.later // 2, cached_frames=1)
        yield from _middle(end.outputs, end.reduction, end.frames)
        latent = 2 * self.z_dim  # mean and log-variance
        yield _causal(end.outputs, latent, end.reduction, end.frames, after_norm=True)
        yield _Layer(1, latent, latent, end.reduction, *end.frames)

    def _decoder(self) -> Iterator[_Layer]:
        blocks = tuple(self.decoder_blocks())
        start, end = blocks[0], blocks[-1]
        yield _Layer(1, self.z_dim, self.z_dim, start.reduction, *start.frames)
        yield _causal(self.z_dim, start.inputs, start.reduction, start.frames)
        yield from _middle(start.inputs, start.reduction, start.frames)
        for block, following in zip(blocks, (*blocks[1:], None), strict=True):
            yield from _resnets(block, self.num_res_blocks + 1)
            if following is not None:
                width, frames = block.outputs, following.frames
                if frames != block.frames:
                    yield _Layer(3, width, 2 * width, block.reduction, 0, block.frames.later, cached_frames=2)
                yield _Layer(9, width, width if self.is_residual else width // 2, following.reduction, *frames)
        yield _causal(end.outputs, self.out_channels, end.reduction, end.frames, after_norm=True)


class CodecBlock(NamedTuple):
    """Residual nets of one resolution: channels in and out, pixels per cell, frames per chunk."""

    inputs: int
    outputs: int
    reduction: int
    frames: _Frames


def _causal(inputs: int, outputs: int, reduction: int, frames: _Frames, *, after_norm: bool = False) -> _Layer:
    return _Layer(27, inputs, outputs, reduction, *frames, cached_frames=2, after_norm=after_norm)


def _resnets(block: CodecBlock, count: int) -> Iterator[_Layer]:
    inputs = block.inputs
    for _ in range(count):
        yield _causal(inputs, block.outputs, block.reduction, block.frames, after_norm=True)
        yield _causal(block.outputs, block.outputs, block.reduction, block.frames, after_norm=True)
        if inputs != block.outputs:
            yield _Layer(1, inputs, block.outputs, block.reduction, *block.frames)
        inputs = block.outputs


def _middle(width: int, reduction: int, frames: _Frames) -> Iterator[_Layer]:
    yield from _resnets(CodecBlock(width, width, reduction, frames), 2)
    yield _Layer(1, width, 3 * width, reduction, *frames, after_norm=True, attention=True)
    yield _Layer(1, width, width, reduction, *frames)


WAN21_VAE = WanCodecDimensions(base_dim=96, decoder_base_dim=96, z_dim=16)
WAN22_VAE = WanCodecDimensions(
    base_dim=160, decoder_base_dim=256, z_dim=48, in_channels=12, out_channels=12, patch_size=2, is_residual=True
)
