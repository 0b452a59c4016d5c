"""Put networks where a memory plan wants them, through the hooks of diffusers and accelerate.

`loaded`: a network comes to the device when it is called, and leaves it when one of another group is. `streamed`: its
blocks come one after the other, on a stream of their own where the device is a GPU, while the block before is at work.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from torch import nn

from swifti2v.errors import MemoryBudgetError
from swifti2v.memory.networks import STORAGES, Quantization, Storage
from swifti2v.memory.normal_float import NormalFloatLinear, pack_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Names under which diffusers keeps its hooks (``diffusers.hooks.group_offloading``)."""

Placement = Literal["resident", "loaded", "streamed"]
"""Where weights stand: all of the run's on the device, those of a phase, or a few blocks at a time."""
BLOCKS_AHEAD = 2
"""The block whose weights come meanwhile, and the one that is started; the one before them may be at work."""

NARROW = torch.float8_e4m3fn
TEXT_ENCODER_EXACT = (r"\.wo$", "norm", r"(^|\.)(shared|embed_tokens)$")
"""Layers of UMT5 that stay as they are: transformers casts what enters ``wo`` to the dtype of its stored weight, and
pipelines cast the prompt's embedding to that of the encoder's first parameter, the table of words."""


class LoadOnCall(ModelHook):  # type: ignore[misc]
    """Brings a network to its device when it is called, after the networks of other groups have left it.

    accelerate's own hook (`CpuOffload`) sends away the network before it only, and moves inputs on the first call only.
    """

    def __init__(self, device: torch.device, send_others_away: Callable[[], None]) -> None:
        self.execution_device = device
        self._send_others_away = send_others_away

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Make room, move the network, and move its inputs."""
        self._send_others_away()
        module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class Pace:
    """Keeps the host no further ahead of a CUDA device than `BLOCKS_AHEAD` blocks of a network that is streamed.

    Weights that a kernel still has to read stay until it is done, and copies may be faster than the work: a host that
    starts one block after the other would have them all there.

    Args:
        device: where the network works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def keep(self, network: nn.Module) -> list[RemovableHandle]:
        """Put hooks on the blocks of `network`, and return them to be removed."""
        lists = (child for child in network.children() if isinstance(child, nn.ModuleList))
        blocks = list(chain.from_iterable(lists))
        waits = [block.register_forward_pre_hook(self._wait) for block in blocks]
        return [*waits, *(block.register_forward_hook(self._note) for block in blocks)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _wait(self, *_: Any) -> None:
        if len(self._ends) == BLOCKS_AHEAD:
            self._ends.popleft().synchronize()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, *_: Any) -> None:
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self.device))
        self._ends.append(end)


class PlacedNetworks:
    """Networks that stand as a plan wants them, until they are released.

    Args:
        device: where they work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: list[tuple[str, nn.Module]] = []
        self._streamed: list[tuple[nn.Module, list[RemovableHandle]]] = []

    def place(self, network: nn.Module, placement: Placement, *, group: str, by_leaf: bool = False) -> None:
        """Place one network.

        Args:
            network: on any device; its weights are not copied but moved.
            placement: see there.
            group: networks of one group are on the device together; when one of them is called, loaded networks of
                other groups leave.
            by_leaf: stream layer by layer instead of block by block, for networks whose blocks diffusers cannot see.
        """
        if placement == "resident":
            network.to(self.device)
        elif placement == "loaded":
            network.to("cpu")
            hook = LoadOnCall(self.device, partial(self.send_away, but=group))
            add_hook_to_module(network, hook)
            self._loaded.append((group, network))
        else:
            self._stream(network, by_leaf=by_leaf)
            handles = [network.register_forward_pre_hook(lambda *_: self.send_away(but=group))]
            if self.device.type == "cuda" and not by_leaf:
                handles += Pace(self.device).keep(network)
            self._streamed.append((network, handles))

    def send_away(self, *, but: str | None = None) -> None:
        """Move loaded networks to the host, except those of a group; they come again when they are called."""
        for group, network in self._loaded:
            # All of them are asked: on a full device a network has come in part, and not its first parameter, as a
            # module moves those of its own last.
            if group != but and any(tensor.device.type != "cpu" for tensor in _tensors(network)):
                network.to("cpu")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def release(self) -> None:
        """Take all hooks off; the networks are on the host then, unless they are resident."""
        self.send_away()
        for _, network in self._loaded:
            remove_hook_from_module(network)
        for network, handles in self._streamed:
            for handle in handles:
                handle.remove()
            remove_group_offloading(network)
        self._loaded.clear()
        self._streamed.clear()
        if self.device.type == "cuda":
            # What libraries and the driver take for themselves does not come from PyTorch's reserve, and would not be
            # there for the next, tighter plan.
            torch.cuda.empty_cache()

    def _stream(self, network: nn.Module, *, by_leaf: bool) -> None:
        network.to("cpu")
        on_gpu = self.device.type == "cuda"
        apply_group_offloading(
            network,
            onload_device=self.device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level" if by_leaf else "block_level",
            num_blocks_per_group=None if by_leaf else 1,
            use_stream=on_gpu,
            non_blocking=on_gpu,
            record_stream=on_gpu,
            # Pinned as it goes: pinning all of a network at once would double it in host memory.
            low_cpu_mem_usage=on_gpu,
        )


def remove_group_offloading(network: nn.Module) -> None:
    """Take diffusers' group offloading off a network; its weights stay on the host."""
    registry = HookRegistry.check_if_exists_or_initialize(network)
    for name in GROUP_HOOKS:
        with suppress(KeyError):
            registry.remove_hook(name, recurse=True)
    network.to("cpu")


def store_weights(network: nn.Module, dtype: Storage, *, compute_dtype: torch.dtype) -> None:
    """Store the large weights of a transformer or text encoder as `dtype`, and compute in `compute_dtype` as before.

    What is not exact any more stays so: weights cannot be taken back to a wider dtype. To be called before `place`.
    Layers with float8 or int8 products hold a byte a weight already, and are left as they are.

    Args:
        network: on any device; on the meta device it is arranged for weights that come later.
        dtype: `float8`, through diffusers' hooks; `nf4` (`normal_float.py`), also where it was `float8` before; wider
            ones change nothing.
        compute_dtype: of the work.

    Raises:
        MemoryBudgetError: weights cannot be stored in `dtype`.
        AdapterError: a LoRA is attached to a network that is to be stored in `nf4`.
    """
    if dtype in {"bfloat16", "float32"}:
        return
    if dtype not in {"float8", "nf4"}:
        msg = f"weights cannot be stored in {dtype}; allow more host memory, or store them in float8 or nf4"
        raise MemoryBudgetError(msg)
    if dtype == "nf4":
        pack_blocks(network, dtype=compute_dtype)
    elif stored_narrow(network) is None:
        if isinstance(network, ModelMixin):
            network.enable_layerwise_casting(storage_dtype=NARROW, compute_dtype=compute_dtype)
        else:
            apply_layerwise_casting(network, NARROW, compute_dtype, skip_modules_pattern=TEXT_ENCODER_EXACT)


def storages_of(dtype: torch.dtype) -> tuple[Storage, ...]:
    """Return how the weights of networks that work in `dtype` can be stored, the most exact first: as they are."""
    return ("float32" if dtype == torch.float32 else "bfloat16", *STORAGES[1:])


def stored_narrow(network: nn.Module) -> Storage | Quantization | None:
    """Return how a network holds its large weights, where they are narrower than the work is.

    Either `store_weights` has stored them, or they are the buffers of layers with float8 or int8 products.
    """
    if any(isinstance(module, NormalFloatLinear) for module in network.modules()):
        return "nf4"
    held = {tensor.dtype for tensor in _tensors(network)}
    if NARROW in held:
        return "float8"
    return "int8" if torch.int8 in held else None


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
