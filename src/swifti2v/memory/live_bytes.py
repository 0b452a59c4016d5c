"""How many bytes of tensors are alive, counted as operations run: on the meta device, at full size, without memory.

Counts what operations allocate, exactly; not what kernels take for themselves (workspaces, layout changes), nor what an
allocator loses between blocks. Attention counts as a fused kernel: its scores are never a tensor.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context: bytes of the storages that were made inside it and still exist, and their peak.

    ```python
    with LiveBytes() as live:
        network(x)
    print(live.peak_bytes)
    ```
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        given = {item.untyped_storage()._cdata for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, torch.Tensor):
                self._count(item, given)
        return result

    def reset_peak(self) -> None:
        """Begin a new phase: the peak starts from what is alive now."""
        self.peak_bytes = self.current_bytes

    def include(self, network: nn.Module) -> None:
        """Count the tensors of a network too, which may be exchanged for others inside (`float8` storage is)."""
        for tensor in chain(network.parameters(), network.buffers()):
            self._count(tensor, set())

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current_bytes -= size


class AttentionFlops:
    """FLOPs of the attention that `fused_attention` stood in for."""

    def __init__(self) -> None:
        self.flop = 0


@contextmanager
def fused_attention() -> Iterator[AttentionFlops]:
    """Let scaled dot-product attention on meta tensors allocate its output only, and count its FLOPs.

    There is no fused kernel for the meta device, where PyTorch would make the scores: 0.6 GiB for each head at 17,600
    tokens.
    """
    original = F.scaled_dot_product_attention
    counted = AttentionFlops()

    def attend(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, *arguments, **options)
        counted.flop += (
            2 * query.numel() * key.shape[-2] + 2 * query[..., 0].numel() * value.shape[-2] * value.shape[-1]
        )
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    F.scaled_dot_product_attention = attend
    try:
        yield counted
    finally:
        F.scaled_dot_product_attention = original


class Account:
    """What a stretch of work costs; `tflop`, `attention_tflop`, `peak_bytes` and `kept_bytes` once it has ended.

    Args:
        counter: PyTorch's, at work.
        attention: FLOPs of attention that PyTorch does not see.
        live: bytes that exist.
        weight_bytes: those of the network that is included, which are left out of what this says.
    """

    def __init__(
        self, counter: FlopCounterMode, attention: AttentionFlops, live: LiveBytes, *, weight_bytes: int
    ) -> None:
        self._counter, self._attention, self._live, self._weight_bytes = counter, attention, live, weight_bytes
        self.tflop = self.attention_tflop = 0.0
        self.peak_bytes = self.kept_bytes = 0

    @property
    def current_bytes(self) -> int:
        """Bytes that exist now."""
        return self._live.current_bytes - self._weight_bytes

    def tflop_so_far(self) -> float:
        """TFLOP until now."""
        return (self._counter.get_total_flops() + self._attention.flop) / 1e12

    def close(self) -> None:
        """Take the sums."""
        self.tflop, self.attention_tflop = self.tflop_so_far(), self._attention.flop / 1e12
        self.peak_bytes, self.kept_bytes = self._live.peak_bytes - self._weight_bytes, self.current_bytes


@contextmanager
def accounted(network: nn.Module | None = None) -> Iterator[Account]:
    """Count the FLOPs and the peak of live bytes of the work inside, which should run on the meta device.

    Args:
        network: whose weights are counted as they change, and left out of the result.
    """
    products = {torch.ops.aten._int_mm: _int8_product_flop}
    counting = FlopCounterMode(display=False, custom_mapping=products)
    with fused_attention() as attention, counting as counter, LiveBytes() as live:
        if network is not None:
            live.include(network)
        account = Account(counter, attention, live, weight_bytes=live.current_bytes)
        yield account
        account.close()


def _int8_product_flop(one_shape: Sequence[int], other_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """PyTorch's counter knows float8's product, and not int8's."""
    return 2 * one_shape[0] * one_shape[1] * other_shape[1]
