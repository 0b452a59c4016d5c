"""Feature caches of a codec in host memory while another tile, or another network, uses the device.

The caches of a 2560x1408 decode are 12 GiB, however it is tiled, and they live as long as the clip. Offloaded, only
those of the tile at work are on the device; each visit costs their transfer there and back.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST_SHARE = 64
SMALLEST_BYTES = 2**16
"""A tensor is cut until the rest is at most `SMALLEST_BYTES`, or at most this fraction of it."""


@dataclass(frozen=True)
class _Offloaded:
    """A tensor in host memory: its numbers in the order of `shape`, in pieces, and its axes in terms of that order."""

    pieces: tuple[Tensor, ...]
    shape: torch.Size
    axes: tuple[int, ...]


@contextmanager
def features_on(device: torch.device, cache: list[Any] | dict[Any, Any], *, offload: bool) -> Iterator[None]:
    """Have the tensors of `cache` on `device` within this context, and on the host after it if `offload`."""
    if offload:
        _replace(cache, lambda entry: _on_device(entry, device))
    yield
    if offload:
        _replace(cache, _on_host)


def _replace(cache: list[Any] | dict[Any, Any], move: Any) -> None:
    entries = list(cache.items()) if isinstance(cache, dict) else list(enumerate(cache))
    for key, entry in entries:
        if isinstance(entry, Tensor | _Offloaded):  # diffusers keeps None and a marker string beside them
            cache[key] = move(entry)
        del entry


def _on_host(tensor: Tensor) -> Tensor | _Offloaded:
    if tensor.is_meta:  # memory is only counted, and the device holds nothing of it
        return tensor.new_empty(1).expand(tensor.shape)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = tensor.permute(order).contiguous()
    parts = torch.split(dense.view(-1), piece_lengths(dense.numel(), dense.element_size()))
    axes = tuple(order.index(axis) for axis in range(tensor.ndim))
    return _Offloaded(tuple(_pinned_copy(part) for part in parts), dense.shape, axes)


def _pinned_copy(part: Tensor) -> Tensor:
    # Pinned blocks are reused by PyTorch's host allocator, and copies of one stream keep their order.
    host = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
    return host.copy_(part, non_blocking=part.is_cuda)


def _on_device(entry: Tensor | _Offloaded, device: torch.device) -> Tensor:
    if isinstance(entry, Tensor):  # there already, or on the meta device
        return entry.clone(memory_format=torch.contiguous_format) if entry.is_meta else entry
    lengths = [len(piece) for piece in entry.pieces]
    flat = torch.empty(sum(lengths), dtype=entry.pieces[0].dtype, device=device)
    for part, piece in zip(torch.split(flat, lengths), entry.pieces, strict=True):
        part.copy_(piece, non_blocking=True)
    return flat.view(entry.shape).permute(entry.axes)


def piece_lengths(count: int, element_bytes: int) -> list[int]:
    """Cut `count` elements into pieces of powers of two in bytes, all but a last, small one.

    PyTorch gives out pinned memory in powers of two and keeps it: uncut, the features of a 2560x1408 decode in 3x3
    tiles take 31 GiB instead of 16.
    """
    lengths, rest = [], count * element_bytes
    least = max(rest // SMALLEST_SHARE, SMALLEST_BYTES)
    while rest > least:
        piece = 1 << (rest.bit_length() - 1)
        lengths.append(piece // element_bytes)
        rest -= piece
    return [*lengths, rest // element_bytes] if rest or not lengths else lengths
