"""Streaming video codecs: pixels to latents and back, one latent frame at a time.

The codec is causal (latent frame j depends on pixel frames 0..4j only), so a clip of any length passes through a
constant amount of memory, the first latent frame is the encoding of the image alone, and a prefix of the latents
decodes to a prefix of the video. Diffusers' own ``encode`` and ``decode`` compute the same numbers but keep the whole
clip on the device; here each stream owns its feature caches and drops them when it ends, however it ends. How one step
runs in little memory is in `wan_chunked.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.pixels import stream_to_uint8
from swifti2v.wan.feature_offload import features_on
from swifti2v.wan.tiling import TileGrid, Tiling
from swifti2v.wan.wan_chunked import ChunkedWanNetwork, can_run_chunked

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from torch import Tensor, nn


@dataclass(frozen=True)
class CodecSettings:
    """How a Wan VAE is run; none of it changes the result beyond rounding, except tiling.

    Args:
        tiling: see `WanStreamingCodec`.
        chunked: run the weights through `ChunkedWanNetwork` where possible; False: through diffusers' own modules.
        frames_per_step: frames at full resolution that the chunked network takes at once; None: two on a CPU, else one.
        offload_features: keep the feature caches in host memory, and bring in those of the tile at work.

    Raises:
        InvalidInputError: `frames_per_step` is less than 1.
    """

    tiling: Tiling | None = None
    chunked: bool = True
    frames_per_step: int | None = None
    offload_features: bool = False

    def __post_init__(self) -> None:
        if self.frames_per_step is not None and self.frames_per_step < 1:
            msg = f"frames_per_step is {self.frames_per_step}; use 1 for the least memory, or 2 or 4"
            raise InvalidInputError(msg, param="frames_per_step", value=self.frames_per_step)


class VideoDecoder(Protocol):
    """What turns latents into frames: a codec, or another decoder of the same latents."""

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents as they come.

        Args:
            latents: normalized, float ``[1, C, n, h, w]``, any n >= 1 per item.

        Yields:
            uint8 ``[f, H, W, 3]`` on the CPU, one per latent frame: f = 1 first, then `temporal_factor`.
        """


@runtime_checkable
class StreamingCodec(VideoDecoder, Protocol):
    """A causal video codec that works latent frame by latent frame."""

    @property
    def num_channels(self) -> int:
        """Channels of the latents."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and width."""

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode chunks as they come.

        Args:
            chunks: float ``[1, 3, f, H, W]`` in [-1, 1], one per latent frame: f = 1 first, then `temporal_factor`.

        Yields:
            Normalized latents, float32 ``[1, C, 1, h, w]``, one per chunk.
        """


def open_codec(vae: object, *, tiling: Tiling | None = None, settings: CodecSettings | None = None) -> StreamingCodec:
    """Return the streaming codec of a loaded `vae`: a Wan VAE is wrapped, an object that streams by itself is returned.

    Raises:
        CheckpointError: `vae` is of no class that can be streamed.
        InvalidInputError: `tiling` was given for an object that streams by itself (`settings` are for a Wan VAE).
    """
    if isinstance(vae, AutoencoderKLWan):
        return WanStreamingCodec(vae, tiling=tiling, settings=settings)
    if isinstance(vae, StreamingCodec):
        if tiling is not None:
            msg = f"{type(vae).__name__} is already a streaming codec and takes no tiling; leave the tiling out"
            raise InvalidInputError(msg)
        return vae
    msg = f"a {type(vae).__name__} cannot encode or decode a stream; use a checkpoint whose vae is an AutoencoderKLWan"
    raise CheckpointError(msg)


class _Stream:
    """What one stream remembers: its frame size and, per tile, the last inputs of every causal convolution."""

    def __init__(
        self, height: int, width: int, grid: TileGrid, *, chunked: ChunkedWanNetwork | None, num_slots: int
    ) -> None:
        self.size = (height, width)
        self.grid = grid
        self.chunked = chunked
        # Diffusers stores tensors, None and a marker string in its lists; they belong to its modules.
        self.caches: list[Any] = [{} if chunked is not None else [None] * num_slots for _ in range(len(grid))]
        self.num_done = 0

    def clear(self) -> None:
        for cache in self.caches:
            cache.clear()


class WanStreamingCodec:
    """Streams an `AutoencoderKLWan`: Wan2.1's (16 channels, 8x8x4) or Wan2.2's (48 channels, 16x16x4).

    Without tiling, latents and pixels are those of ``vae.encode(...).latent_dist.mode()`` and ``vae.decode()`` before
    rounding to uint8: bit by bit with diffusers' own modules (`CodecSettings.chunked` False), up to the rounding
    of its convolutions with the chunked network. The network runs in the dtype of `vae`; normalization by the
    checkpoint's ``latents_mean`` and ``latents_std`` is float32. Any number of streams may be open at once: each has
    its own caches, and the ones inside `vae` are never touched. ``vae.enable_tiling()`` has no effect here.

    Offloading hooks of accelerate and diffusers work: they are called before every latent frame, so that another model
    may take the device between two of them. Hooks on parts of the codec make it run diffusers' own modules.

    Args:
        vae: the codec's weights; not copied, not moved.
        tiling: cut frames into tiles; every tile is advanced by one latent frame (with offloaded features: by one item
            of the latents) before the next is taken, so that memory still does not depend on the length. Blended in
            pixels by decode, in latents by encode.
        settings: how the weights are run; its tiling counts where `tiling` is None.

    Raises:
        CheckpointError: the configuration of `vae` contradicts itself.
        InvalidInputError: tile or overlap are not multiples of the spatial factor.
    """

    def __init__(
        self, vae: AutoencoderKLWan, *, tiling: Tiling | None = None, settings: CodecSettings | None = None
    ) -> None:
        config = vae.config
        _check_config(config)
        self.vae = vae
        self.settings = settings or CodecSettings()
        self.tiling = tiling = tiling or self.settings.tiling
        self.num_channels: int = config.z_dim
        self.spatial_factor: int = config.scale_factor_spatial
        self.temporal_factor: int = config.scale_factor_temporal
        self._patch_size: int = config.patch_size or 1
        self._mean = torch.tensor(config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        if tiling is not None:
            tiling.check(self.spatial_factor)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Encode chunks as they come; see `StreamingCodec.encode_stream`. Latents stay on the device of the codec.

        Raises:
            InvalidInputError: a chunk has the wrong shape, number of frames, size or dtype, or holds NaN or infinity.
            CheckpointError: the network turned finite pixels into values that are not finite.
        """
        stream: _Stream | None = None
        try:
            for chunk in chunks:
                self._check_chunk(chunk, stream)
                if stream is None:
                    factor = self.spatial_factor
                    stream = self._open(self.vae.encoder, chunk.shape[-2] // factor, chunk.shape[-1] // factor)
                latent = self._encode_chunk(chunk, stream)
                # Neither side of a finished step may be kept alive while the next is produced.
                del chunk
                yield latent
                del latent
        finally:
            if stream is not None:
                stream.clear()

    def decode_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Decode latents as they come; see `StreamingCodec.decode_stream`.

        Raises:
            InvalidInputError: an item has the wrong shape, channels or dtype, another size, or holds NaN or infinity.
            CheckpointError: the network turned finite latents into values that are not finite.
        """
        return stream_to_uint8(self.decode_pixel_stream(latents))

    def decode_pixel_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Decode like `decode_stream`, before rounding: yields float32 ``[1, 3, f, H, W]`` in [-1, 1] on the device."""
        stream: _Stream | None = None
        try:
            for item in latents:
                check_latents(
                    item, self.num_channels, stream.size if stream else None, stream.num_done if stream else 0
                )
                if stream is None:
                    stream = self._open(self.vae.decoder, item.shape[-2], item.shape[-1])
                for group in torch.split(item, item.shape[2] if self.settings.offload_features else 1, dim=2):
                    pieces = self._decode_group(group, stream)
                    while pieces:
                        yield pieces.pop(0)
                    del group
                del item
        finally:
            if stream is not None:
                stream.clear()

    def _open(self, network: nn.Module, height: int, width: int) -> _Stream:
        """Start a stream of `height` x `width` latent cells through the encoder or the decoder."""
        grid = TileGrid.plan(height, width, tiling=self.tiling, spatial_factor=self.spatial_factor)
        num_slots = sum(isinstance(module, WanCausalConv3d) for module in network.modules())
        is_chunked = self.settings.chunked and can_run_chunked(self.vae)
        chunked = ChunkedWanNetwork(self.vae, frames_per_step=self.settings.frames_per_step) if is_chunked else None
        return _Stream(height, width, grid, chunked=chunked, num_slots=num_slots)

    # Gradients are switched off per step and not around the streams: a generator that is suspended inside such a
    # context would switch them off for its consumer too. Not inference_mode, whose tensors cannot be trained on.
    @torch.no_grad()
    def _encode_chunk(self, chunk: Tensor, stream: _Stream) -> Tensor:
        """Encode one chunk to one normalized latent frame ``[1, C, 1, h, w]`` and advance the caches."""
        device = self._claim_device()
        check_finite(chunk, f"pixel chunk {stream.num_done}")
        pixels = chunk.to(device=device, dtype=self.vae.dtype)
        tiles = stream.grid.cut(pixels, scale=self.spatial_factor)
        encoded = (self._encode_tile(tile, cache, stream) for tile, cache in zip(tiles, stream.caches, strict=True))
        latent = stream.grid.blend(encoded)
        check_result(latent, self.vae.dtype, "pixels", stream.num_done)
        stream.num_done += 1
        return (latent - self._mean.to(latent.device)) / self._std.to(latent.device)

    @torch.no_grad()
    def _decode_group(self, latents: Tensor, stream: _Stream) -> list[Tensor]:
        """Decode normalized latent frames, tile after tile; return float32 pixels ``[1, 3, f, H, W]`` of each frame."""
        device = self._claim_device()
        check_finite(latents, f"latent frame {stream.num_done}")
        latents = latents.to(device=device, dtype=torch.float32)
        latents = (latents * self._std.to(device) + self._mean.to(device)).to(self.vae.dtype)
        tiles = zip(stream.grid.cut(latents), stream.caches, strict=True)
        decoded = (self._decode_tile(tile, cache, stream) for tile, cache in tiles)
        pixels = stream.grid.blend(decoded, scale=self.spatial_factor)
        check_result(pixels, self.vae.dtype, "latents", stream.num_done)
        first = stream.num_done == 0
        stream.num_done += latents.shape[2]
        pixels.clamp_(-1.0, 1.0)
        count = self.temporal_factor
        head = 1 if first else count
        return [pixels[:, :, :head], *torch.split(pixels[:, :, head:], count, dim=2)][: latents.shape[2]]

    def _encode_tile(self, pixels: Tensor, cache: Any, stream: _Stream) -> Tensor:
        """Return the posterior's mode of one tile of one chunk, not normalized."""
        if self._patch_size > 1:
            pixels = patchify(pixels.contiguous(), patch_size=self._patch_size)
        with features_on(pixels.device, cache, offload=self.settings.offload_features):
            if stream.chunked is not None:
                hidden = stream.chunked.encode(pixels, cache)
            else:
                hidden = self.vae.encoder(pixels, feat_cache=cache, feat_idx=[0])
        moments: Tensor = self.vae.quant_conv(hidden)
        return moments[:, : self.num_channels]

    def _decode_tile(self, latents: Tensor, cache: Any, stream: _Stream) -> Tensor:
        """Return the pixels of one tile of some latent frames, not clamped."""
        pieces = []
        with features_on(latents.device, cache, offload=self.settings.offload_features):
            for index, latent in enumerate(torch.split(latents, 1, dim=2)):
                first = stream.num_done + index == 0
                hidden = self.vae.post_quant_conv(latent)
                if stream.chunked is not None:
                    pixels = stream.chunked.decode(hidden, cache, first_chunk=first)
                else:
                    pixels = self.vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
                pieces.append(unpatchify(pixels, patch_size=self._patch_size) if self._patch_size > 1 else pixels)
                del hidden, pixels
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _claim_device(self) -> torch.device:
        """Let an offloading hook bring the weights in, and return the device on which the network runs.

        Diffusers fires such a hook on ``forward``, ``encode`` and ``decode`` only, and encoder and decoder are called
        directly here. Hooks on the submodules (sequential and group offloading) fire by themselves.
        """
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.vae)
        for module in self.vae.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return self.vae.device

    def _check_chunk(self, chunk: Tensor, stream: _Stream | None) -> None:
        """Raise `InvalidInputError` unless `chunk` can be the next of the stream (None: the first)."""
        if chunk.ndim != 5 or chunk.shape[:2] != (1, 3) or not chunk.is_floating_point():
            msg = (
                f"a chunk of {describe(chunk)} cannot be encoded; "
                "give float pixels [1, 3, frames, height, width] in [-1, 1]"
            )
            raise InvalidInputError(msg)
        index, expected = (0, 1) if stream is None else (stream.num_done, self.temporal_factor)
        if chunk.shape[2] != expected:
            msg = (
                f"pixel chunk {index} has {chunk.shape[2]} frames instead of {expected}; "
                f"cut the clip into chunks of 1, {self.temporal_factor}, {self.temporal_factor}, ... frames"
            )
            raise InvalidInputError(msg)
        height, width = chunk.shape[-2:]
        factor = self.spatial_factor
        if min(height, width) < factor or height % factor or width % factor:
            msg = f"pixel chunk {index} is {width}x{height}; give width and height in multiples of {factor}"
            raise InvalidInputError(msg)
        if stream is not None:
            check_same_size(f"pixel chunk {index}", (height, width), (stream.size[0] * factor, stream.size[1] * factor))


def _check_config(config: AutoencoderKLWan) -> None:
    """Raise `CheckpointError` if the factors or statistics of a Wan VAE's configuration contradict its network."""
    spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
    temporal = 2 ** sum(config.temperal_downsample)
    for name, stated, actual in (
        ("scale_factor_spatial", config.scale_factor_spatial, spatial),
        ("scale_factor_temporal", config.scale_factor_temporal, temporal),
        ("length of latents_mean", len(config.latents_mean), config.z_dim),
        ("length of latents_std", len(config.latents_std), config.z_dim),
    ):
        if stated != actual:
            msg = f"the codec's configuration says {name} = {stated}, but its network has {actual}; correct config.json"
            raise CheckpointError(msg)
    if not all(std > 0 and math.isfinite(std) for std in config.latents_std):
        msg = "the codec's configuration has a value in latents_std that is not positive; correct config.json"
        raise CheckpointError(msg)


# --------------------------------------------------------------------------------- what the streams of all codecs check


def check_latents(latents: Tensor, channels: int, size: tuple[int, int] | None, index: int) -> None:
    """Raise `InvalidInputError` unless `latents` can be an item of a stream.

    Args:
        latents: normalized, float ``[1, channels, n, h, w]``.
        channels: of the codec.
        size: height and width in cells with which the stream began; None: this is its first item.
        index: of the item's first latent frame, for the message.
    """
    usable = latents.ndim == 5 and latents.shape[:2] == (1, channels) and latents.is_floating_point()
    if not usable or 0 in latents.shape:
        msg = (
            f"latents of {describe(latents)} cannot be decoded; "
            f"give normalized floats [1, {channels}, frames, height, width] of this codec"
        )
        raise InvalidInputError(msg)
    if size is not None:
        check_same_size(f"latent frame {index}", tuple(latents.shape[-2:]), size)


def check_same_size(name: str, actual: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Raise `InvalidInputError` unless height and width are those with which the stream began."""
    if actual != expected:
        msg = (
            f"{name} is {actual[1]}x{actual[0]} but the stream began with {expected[1]}x{expected[0]}; "
            "use one stream per size"
        )
        raise InvalidInputError(msg)


def check_finite(values: Tensor, name: str) -> None:
    """Raise `InvalidInputError` if what is given to a codec holds NaN or infinity."""
    if not is_finite(values):
        msg = f"{name} holds NaN or infinity; it comes from the step before, run that in bfloat16 or float32"
        raise InvalidInputError(msg)


def check_result(values: Tensor, dtype: torch.dtype, source: str, index: int) -> None:
    """Raise `CheckpointError` if a network in `dtype` produced NaN or infinity from finite `source` (a word)."""
    if not is_finite(values):
        msg = (
            f"the codec in {dtype} made values that are not finite from the {source} of latent frame "
            f"{index}; load it in bfloat16 or float32, or replace its weights"
        )
        raise CheckpointError(msg)


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity."""
    # On the meta device, where costs are counted, there are no values.
    return values.is_meta or bool(torch.isfinite(values).all())


def describe(tensor: Tensor) -> str:
    """Return shape and dtype, for messages."""
    return f"shape {list(tensor.shape)} and {tensor.dtype}"
