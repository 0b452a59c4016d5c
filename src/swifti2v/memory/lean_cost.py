"""Peak bytes of the lean codec (`wan/lean_vae.py`), by counting what is alive at its worst lines. Arithmetic only.

The tests hold these against the live bytes of the network itself on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swifti2v.geometry import Size
    from swifti2v.memory.codec_cost import CodecBlock, WanCodecDimensions

BAND_BYTES = 4 * 4 * 2**24
"""A band of rows in float32 while it is normalised: 2**24 elements, four times over."""


def lean_decode_bytes(codec: WanCodecDimensions, size: Size, *, frames_per_step: int = 1) -> int:
    """Peak bytes of decoding a frame (or tile) of `size` in bf16, caches included, weights left out."""
    blocks = list(codec.decoder_blocks())
    deepest = max(block.frames.later for block in blocks)
    below = [block for block in blocks if block.frames.later == deepest]
    # What the blocks above hold while the last one works: the frames of the last change of rate, and of each block in
    # between what enters its resnets and what leaves them.
    waiting = sum(
        (block.inputs + block.outputs) * _cells(size, block.reduction) * frames_per_step for block in below[:-1]
    )
    waiting += below[0].inputs * _cells(size, 2 * below[0].reduction) * deepest
    working = _residual_elements(blocks[-1], size, min(frames_per_step, deepest))
    return codec.decode_cache_bytes(size) + 2 * (working + waiting) + _band_bytes(working)


def lean_encode_bytes(codec: WanCodecDimensions, size: Size, *, frames_per_step: int = 1) -> int:
    """Peak bytes of encoding a frame (or tile) of `size` in bf16, caches included, weights left out."""
    blocks = list(codec.encoder_blocks())
    most = blocks[0].frames.later
    above = [block for block in blocks if block.reduction <= codec.patch_size]
    working = max(
        _residual_elements(block, size, frames_per_step if block in above else most, keeps_entry=codec.is_residual)
        for block in blocks
        if block.frames.later == most
    )
    pieces = blocks[0].outputs * _cells(size, 2 * blocks[0].reduction) * most
    return codec.encode_cache_bytes(size) + 2 * (working + pieces) + _band_bytes(working)


def _residual_elements(block: CodecBlock, size: Size, frames: int, *, keeps_entry: bool = False) -> int:
    """Elements alive in the first residual net of a block: at its first or at its second convolution."""
    cells = _cells(size, block.reduction)
    inputs, outputs = block.inputs * cells, block.outputs * cells
    shortcut = outputs * frames if block.inputs != block.outputs else 0
    entry = inputs * frames
    first = inputs * (2 + frames) + entry + shortcut
    second = outputs * (2 + frames) + outputs * frames + (shortcut or entry) + (entry if keeps_entry else 0)
    return max(first, second)


def _band_bytes(working_elements: int) -> int:
    return min(BAND_BYTES, 4 * working_elements)


def _cells(size: Size, reduction: int) -> int:
    return (size.width // reduction) * (size.height // reduction)
