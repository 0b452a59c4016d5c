"""The processes of a run: one, or those that torchrun started, with whole or sharded weights (FSDP2).

Both ways to spread a network are PyTorch's `fully_shard`, so there is one path for training and for checkpoints:

* `replicate`: every process holds all weights, gradients are averaged (what DDP does; a mesh of processes x 1).
* `shard`: every process holds its part of weights, gradients and optimiser, and gathers a block while it runs.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Sharding = Literal["replicate", "shard"]
T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them; by default the only one, on the CPU."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; all of them have to ask."""
        if self.count == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in the order of ranks; all of them have to ask."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def distribute(self, module: nn.Module, sharding: Sharding) -> None:
        """Move `module` to the device and spread it, in place; afterwards its parameters are `DTensor`s.

        Blocks (members of the outermost `ModuleList`s) are gathered one at a time. All processes must hold the same
        weights. With one process nothing but the move happens.
        """
        if self.count == 1:
            module.to(self.device)
            return
        if sharding == "shard":
            mesh = init_device_mesh(self.device.type, (self.count,))
        else:
            mesh = init_device_mesh(self.device.type, (self.count, 1), mesh_dim_names=("replicate", "shard"))
        for network in networks_of(module):
            for block in _blocks(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)


class Batches(Protocol):
    """Which samples make a batch; `data.batches.BucketBatches` of this process's rank is one."""

    def batch_of(self, step: int) -> Sequence[int]:
        """Return indices of samples of one shape; a function of `step` only."""
        ...


class BatchesOfProcess:
    """Batches by the numbers that the loop counts, which go through all processes: each takes its own of the step.

    Args:
        batches: made with the rank and the count of `processes`, so that all get samples of one shape at a time.
        processes: those of the loop.
    """

    def __init__(self, batches: Batches, processes: Processes) -> None:
        self._batches = batches
        self._count = processes.count

    def batch_of(self, step: int) -> Sequence[int]:
        """Return the indices of batch number `step`."""
        return self._batches.batch_of(step // self._count)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on CUDA devices, gloo on CPUs); without it, be the only one.

    ```
    torchrun --nproc-per-node 8 -m swifti2v train ...
    ```
    """
    has_cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield Processes(device=torch.device("cuda", 0) if has_cuda else CPU)
        return
    device = torch.device("cuda", dist.get_node_local_rank()) if has_cuda else CPU
    if has_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_cuda else "gloo")
    try:
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def networks_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are called: `module`, or its members where it is a mere container."""
    if type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [network for member in module.children() for network in networks_of(member)]
    return [module]


def whole(value: Any, *, keep: bool = True) -> Any:
    """Return `value` (tensors in dicts and lists) with every distributed tensor put together, on the CPU.

    Putting together is done by all processes; those with ``keep=False`` drop each tensor at once and get None for it.
    """
    if isinstance(value, dict):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep=keep) for item in value)
    if not isinstance(value, Tensor):
        return value
    tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return tensor.detach().cpu() if keep else None


def placed_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of the whole `tensor` on the device of `reference`, and spread as it is."""
    tensor = tensor.detach().to(reference.device, copy=True)
    if not isinstance(reference, DTensor):
        return tensor
    # Every process has read the whole tensor, so each takes its part without asking the first one.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)
