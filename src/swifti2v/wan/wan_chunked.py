"""Wan's codec in a fraction of the memory: diffusers' weights and numbers, with other bookkeeping.

Diffusers normalizes a whole chunk in float32, copies it for the cache, joins it with the cache, and pads the result: at
2560x1408 a decode holds 38 GiB. Here norm and SiLU are written, a band of rows at a time, into the one tensor that the
convolution reads, which holds the cached frames and the zero border already; residuals are added in place; nearest
upsampling stays in the working dtype; and at the highest frame rate frames pass one (or a few) at a time. Every value
is computed by the same formula in the same dtype, so results differ only by the rounding of a convolution that sees
another number of frames, and on most CPUs not at all.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanUpBlock,
)
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanCausalConv3d
    from torch import Tensor

FeatureCache = dict[nn.Module, "Tensor"]
"""The last input frames of each causal convolution, ``[1, C, 1 or 2, h, w]``; empty at the start of a stream."""

BAND_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Elements that are normalized at once: on a CPU what its caches hold, on a GPU enough to fill it."""


def can_run_chunked(vae: AutoencoderKLWan) -> bool:
    """Return whether `ChunkedWanNetwork` gives the numbers of a codec.

    It does not where a part of the codec has a hook (sequential or leaf-level offloading brings in the weights of a
    layer when its ``forward`` is called, and here it is not called), with dropout switched on, or with layers that
    diffusers 0.42 does not build.
    """
    for module in vae.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_diffusers_hook")
        if module is not vae and (hooked or hasattr(module, "_hf_hook")):
            return False
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return False
    down = (WanResidualBlock, WanAttentionBlock, WanResample, WanResidualDownBlock)
    return all(isinstance(block, down) for block in vae.encoder.down_blocks) and all(
        isinstance(block, WanResidualUpBlock | WanUpBlock) for block in vae.decoder.up_blocks
    )


class ChunkedWanNetwork:
    """Encoder and decoder of an `AutoencoderKLWan`, chunk by chunk.

    Args:
        vae: the weights, borrowed.
        frames_per_step: frames at full resolution that pass together, >= 1: more of them read the weights less often
        and
            hold more memory. None: two on a CPU, where calls cost more, else one.
    """

    def __init__(self, vae: AutoencoderKLWan, *, frames_per_step: int | None = None) -> None:
        self.vae = vae
        self.frames_per_step = frames_per_step

    def encode(self, pixels: Tensor, cache: FeatureCache) -> Tensor:
        """Encode one patchified chunk ``[1, C, f, H, W]`` to moments before ``quant_conv``, and advance the cache."""
        encoder = self.vae.encoder
        blocks = list(encoder.down_blocks)
        # Up to the first change of frame rate a frame needs only the past.
        shallow = next((index for index, block in enumerate(blocks) if _changes_rate(block)), len(blocks))
        pieces = []
        for frames in torch.split(pixels, self._step(pixels), dim=2):
            hidden = self._convolve(encoder.conv_in, frames, cache)
            for block in blocks[:shallow]:
                hidden = self._down(block, hidden, cache)
            pieces.append(hidden)
            del hidden
        hidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        pieces.clear()
        for block in blocks[shallow:]:
            hidden = self._down(block, hidden, cache)
        hidden = self._middle(encoder.mid_block, hidden, cache)
        return self._convolve(encoder.conv_out, hidden, cache, norm=encoder.norm_out, activation=encoder.nonlinearity)

    def decode(self, hidden: Tensor, cache: FeatureCache, *, first_chunk: bool) -> Tensor:
        """Decode one latent frame after ``post_quant_conv`` to patchified pixels, and advance the cache."""
        decoder = self.vae.decoder
        hidden = self._convolve(decoder.conv_in, hidden, cache)
        held = [self._middle(decoder.mid_block, hidden, cache)]
        del hidden
        return torch.cat(list(self._rise(0, held, cache, first_chunk)), dim=2)

    def _step(self, frames: Tensor) -> int:
        return self.frames_per_step or (2 if frames.device.type == "cpu" else 1)

    def _rise(self, index: int, held: list[Tensor], cache: FeatureCache, first_chunk: bool) -> Iterator[Tensor]:
        """Yield what the blocks from `index` on make of the one tensor in `held`, which is removed from it."""
        decoder = self.vae.decoder
        if index == len(decoder.up_blocks):
            yield self._convolve(
                decoder.conv_out, held.pop(), cache, norm=decoder.norm_out, activation=decoder.nonlinearity
            )
            return
        block = decoder.up_blocks[index]
        # The input outlives the resnets only where a shortcut around the block reads it.
        entry = held[0] if getattr(block, "avg_shortcut", None) is not None else None
        for resnet in block.resnets:
            self._residual(resnet, held, cache)
        if (resample := _upsampler(block)) is None:
            yield from self._rise(index + 1, held, cache, first_chunk)
            return
        for first_frame, raised in self._upsample(resample, held, cache, first_chunk):
            group = [raised]
            del raised
            if entry is not None:
                _add_duplicated(group[0], entry, block.avg_shortcut, first_frame, first_chunk=first_chunk)
            yield from self._rise(index + 1, group, cache, first_chunk)

    def _middle(self, block: Any, hidden: Tensor, cache: FeatureCache) -> Tensor:
        held = [hidden]
        del hidden
        self._residual(block.resnets[0], held, cache)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                held = [attention(held.pop())]
            self._residual(resnet, held, cache)
        return held.pop()

    def _down(self, block: Any, hidden: Tensor, cache: FeatureCache) -> Tensor:
        if isinstance(block, WanResidualBlock):
            held = [hidden]
            self._residual(block, held, cache)
            return held.pop()
        if isinstance(block, WanResample):
            return self._downsample(block, hidden, cache)
        if isinstance(block, WanAttentionBlock):
            return block(hidden)
        held = [hidden]
        for resnet in block.resnets:
            self._residual(resnet, held, cache)
        result = held.pop()
        if block.downsampler is not None:
            result = self._downsample(block.downsampler, result, cache)
        return result.add_(block.avg_shortcut(hidden))

    def _residual(self, block: Any, held: list[Tensor], cache: FeatureCache) -> None:
        """Replace the tensor in `held` by what a `WanResidualBlock` makes of it."""
        entry = held.pop()
        is_same = isinstance(block.conv_shortcut, nn.Identity)
        shortcut = entry if is_same else _plain_convolution(block.conv_shortcut, entry)
        inner = [entry]
        del entry
        for convolution, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
            inner.append(self._convolve(convolution, inner.pop(), cache, norm=norm, activation=block.nonlinearity))
        held.append(inner.pop().add_(shortcut))

    def _convolve(
        self,
        convolution: WanCausalConv3d,
        frames: Tensor,
        cache: FeatureCache,
        *,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> Tensor:
        """Run a causal convolution over ``activation(norm(frames))`` after the frames in the cache."""
        _, channels, count, height, width = frames.shape
        left, _, top, _, past, _ = convolution._padding
        shape = (1, channels, past + count, height + 2 * top, width + 2 * left)
        padded = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=_layout(frames))
        for axis, border in ((3, top), (4, left)):
            if border:
                padded.narrow(axis, 0, border).zero_()
                padded.narrow(axis, shape[axis] - border, border).zero_()
        inside = padded[:, :, :, top : top + height, left : left + width]
        cached = cache.get(convolution)
        if cached is None:
            inside[:, :, :past].zero_()
        else:
            inside[:, :, :past].copy_(cached)
        _write_activated(inside[:, :, past:], frames, norm, activation)
        del frames  # whoever still needs them holds them
        result = F.conv3d(padded, convolution.weight, convolution.bias, convolution.stride)
        if cached is None:
            cache[convolution] = inside[:, :, -past:].clone(memory_format=_layout(inside))
        else:
            cached.copy_(inside[:, :, -past:])
        return result

    def _upsample(
        self, resample: WanResample, held: list[Tensor], cache: FeatureCache, first_chunk: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield groups of frames at twice the size, each with the index of its first frame in the chunk."""
        hidden = held.pop()
        channels = hidden.shape[1]
        if resample.mode == "upsample3d" and not first_chunk:
            doubled = self._convolve(resample.time_conv, hidden, cache)
            halves = torch.split(doubled, channels, dim=1)
            frames = [half[:, :, index] for index in range(hidden.shape[2]) for half in halves]
            del doubled, halves
        else:
            frames = list(hidden.unbind(2))
        del hidden
        _, convolution = resample.resample
        step = self._step(frames[0])
        for start in range(0, len(frames), step):
            group = torch.cat(frames[start : start + step])
            large = F.interpolate(group, scale_factor=2.0, mode="nearest-exact")
            del group
            raised = [convolution(large)]
            del large
            # Out of the list, or this generator would keep the frames alive while its reader works on them.
            yield start, raised.pop().transpose(0, 1).unsqueeze(0)

    def _downsample(self, resample: WanResample, hidden: Tensor, cache: FeatureCache) -> Tensor:
        frames = [resample.resample(frame).unsqueeze(2) for frame in hidden.unbind(2)]
        if resample.mode != "downsample3d":
            return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)
        cached = cache.get(resample)
        cache[resample] = frames[-1].clone()
        if cached is None:  # the first frame of a clip stands alone
            return frames[0]
        convolution = resample.time_conv
        return F.conv3d(torch.cat([cached, *frames], dim=2), convolution.weight, convolution.bias, convolution.stride)


def _changes_rate(block: nn.Module) -> bool:
    resample = block if isinstance(block, WanResample) else getattr(block, "downsampler", None)
    return resample is not None and resample.mode == "downsample3d"


def _upsampler(block: nn.Module) -> WanResample | None:
    if isinstance(block, WanUpBlock):
        return block.upsamplers[0] if block.upsamplers is not None else None
    return block.upsampler


def _plain_convolution(convolution: WanCausalConv3d, frames: Tensor) -> Tensor:
    """Run a 1x1x1 convolution, which needs neither border nor past."""
    return F.conv3d(frames, convolution.weight, convolution.bias)


def _layout(frames: Tensor) -> torch.memory_format:
    """Channels last on a GPU, whose convolutions are made for it; oneDNN reorders by itself."""
    return torch.channels_last_3d if frames.device.type == "cuda" else torch.contiguous_format


def _write_activated(target: Tensor, frames: Tensor, norm: nn.Module | None, activation: nn.Module | None) -> None:
    """Write ``activation(norm(frames))`` into `target`, a few rows of a frame at a time."""
    if norm is None or activation is None:
        target.copy_(frames)
        return
    _, channels, count, height, width = frames.shape
    budget = BAND_ELEMENTS.get(frames.device.type, BAND_ELEMENTS["cuda"])
    rows = max(1, min(height, budget // (channels * width)))
    for index, start in product(range(count), range(0, height, rows)):
        band = (slice(None), slice(None), slice(index, index + 1), slice(start, start + rows))
        target[band] = activation(norm(frames[band]))


def _add_duplicated(raised: Tensor, entry: Tensor, shortcut: DupUp3D, first_frame: int, *, first_chunk: bool) -> None:
    """Add the frames ``first_frame ..`` of ``shortcut(entry)`` to `raised`, without making them.

    `DupUp3D` repeats channels and deals them out over time, rows and columns; each place of that pattern reads every
    so-many-th channel of `entry`.
    """
    in_time, in_space, repeats = shortcut.factor_t, shortcut.factor_s, shortcut.repeats
    skipped = in_time - 1 if first_chunk else 0
    for index in range(raised.shape[2]):
        source, phase = divmod(first_frame + index + skipped, in_time)
        for row, column in product(range(in_space), repeat=2):
            place = (phase * in_space + row) * in_space + column
            channels = [(out * shortcut.factor + place) // repeats for out in range(shortcut.out_channels)]
            target = raised[:, :, index, row::in_space, column::in_space]
            target += _choose_channels(entry[:, :, source], channels)


def _choose_channels(frame: Tensor, channels: list[int]) -> Tensor:
    """Return those channels of ``[1, C, h, w]``: as a view where they lie evenly spaced."""
    step = channels[1] - channels[0] if len(channels) > 1 else 1
    if step > 0 and channels == list(range(channels[0], channels[-1] + 1, step)):
        return frame[:, channels[0] : channels[-1] + 1 : step]
    return frame[:, channels]
