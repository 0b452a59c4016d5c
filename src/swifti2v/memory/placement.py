"""Put networks where a memory plan wants them, through the hooks of diffusers and accelerate.

`loaded`: a network comes to the device when it is called, and leaves it when one of another group is. `streamed`: its
blocks come one after the other, on a stream of their own where the device is a GPU, while the block before is at work.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from swifti2v.memory.ways import Placement

GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Names under which diffusers keeps its hooks (``diffusers.hooks.group_offloading``)."""


BLOCKS_AHEAD = 2
"""The block whose weights come meanwhile, and the one that is started; the one before them may be at work."""


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
            placement: see `swifti2v.memory.ways.Way`.
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


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
