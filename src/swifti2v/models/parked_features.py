"""Feature caches of a codec in host memory while another tile, or another network, has the device.

The caches of a 2560x1408 decode are 12 GiB, however it is tiled, and they live as long as the clip. Parked, only those
of the tile at work are on the device; each visit costs their way there and back.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor


def visit(cache: list[Any] | dict[Any, Any], device: torch.device, *, parked: bool) -> AbstractContextManager[None]:
    """Have the tensors of `cache` on `device` within this context, and, if `parked`, on the host after it."""
    return _visit(cache, device) if parked else nullcontext()


@contextmanager
def _visit(cache: list[Any] | dict[Any, Any], device: torch.device) -> Iterator[None]:
    _replace(cache, lambda tensor: _on_device(tensor, device))
    yield
    _replace(cache, _on_host)


def _replace(cache: list[Any] | dict[Any, Any], move: Any) -> None:
    entries = list(cache.items()) if isinstance(cache, dict) else list(enumerate(cache))
    for key, entry in entries:
        if isinstance(entry, torch.Tensor):  # diffusers keeps None and a marker string beside them
            cache[key] = move(entry)
        del entry


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.is_meta:  # an account: elsewhere means that the device holds nothing of it
        return tensor.new_empty(1).expand(tensor.shape)
    # Pinned blocks are reused by PyTorch's host allocator, and copies of one stream keep their order.
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to(device, non_blocking=True)
