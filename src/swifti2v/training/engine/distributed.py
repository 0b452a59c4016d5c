"""The processes of a run: one, or those that torchrun started, with whole or sharded weights (FSDP2).

Both ways to spread a network are PyTorch's `fully_shard`, so there is one path for training and for checkpoints:

* `replicate`: every process holds all weights, gradients are averaged (what DDP does; a mesh of processes x 1).
* `shard`: every process holds its part of weights, gradients and optimizer, and gathers a block while it runs.

Samples too long for one device are shared by several (context parallelism): each has a part of the tokens, and in
attention a part of the heads (diffusers' Ulysses attention). Such a group counts as one process that has a batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from swifti2v.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

Sharding = Literal["replicate", "shard"]
T = TypeVar("T")
CPU = torch.device("cpu")
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others. All wait while the first writes a checkpoint: the state of five billion
trained weights is 80 GB, a quarter of an hour at 100 MB/s, and NCCL's own limit is ten minutes."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them; by default the only one, on the CPU.

    Args:
        rank: of this one.
        count: of all.
        device: of this one.
        context: how many neighbors in rank share their samples.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    context: int = 1

    @property
    def batch_rank(self) -> int:
        """Which of the batches of a step this process has."""
        return self.rank // self.context

    @property
    def batch_count(self) -> int:
        """How many batches the processes have at a time."""
        return self.count // self.context

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

        Raises:
            ConfigurationError: the network cannot share samples.
        """
        if self.count == 1:
            module.to(self.device)
            return
        if sharding == "shard":
            mesh = init_device_mesh(self.device.type, (self.count,))
        else:
            mesh = init_device_mesh(self.device.type, (self.count, 1), mesh_dim_names=("replicate", "shard"))
        for network in networks_of(module):
            self.share_tokens(network)
            for block in _blocks(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)

    def share_tokens(self, network: nn.Module) -> None:
        """Let the processes of a group pass the tokens of a sample through `network` together; alone, do nothing.

        A loss is then that of the whole sample in each of them, and a weight's gradient, summed over the group, too:
        every process has the gradient by its own tokens.

        Raises:
            ConfigurationError: not a network of diffusers, heads that do not divide, or no accelerators.
        """
        if self.context == 1:
            return
        heads = getattr(getattr(network, "config", None), "num_attention_heads", 0)
        if not getattr(network, "_cp_plan", None) or heads % self.context:
            msg = (
                f"{type(network).__name__} of {heads} heads cannot be shared by {self.context}; set context_parallel: 1"
            )
            raise ConfigurationError(msg)
        if not torch.accelerator.device_count():
            msg = "context_parallel needs an accelerator for each process; set it to 1 on CPUs"
            raise ConfigurationError(msg)
        for name, module in network.named_modules():
            if name.endswith((".norm_q", ".norm_k")):
                module.register_forward_hook(_as_autocast)
        shape, names = (self.batch_count, 1, self.context), ("batches", "ring", "ulysses")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.context, mesh=mesh))  # type: ignore[operator]


@contextmanager
def joined_processes(context_parallel: int = 1) -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on CUDA devices, gloo on CPUs); without it, be the only one.

    ```
    torchrun --nproc-per-node 8 -m swifti2v.cli.main train ...
    ```

    Args:
        context_parallel: how many share their samples.

    Raises:
        ConfigurationError: their number does not divide by that.
    """
    has_cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        _check_groups(1, context_parallel)
        yield Processes(device=torch.device("cuda", 0) if has_cuda else CPU)
        return
    device = torch.device("cuda", dist.get_node_local_rank()) if has_cuda else CPU
    if has_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        _check_groups(dist.get_world_size(), context_parallel)
        yield Processes(dist.get_rank(), dist.get_world_size(), device, context_parallel)
    finally:
        dist.destroy_process_group()


def networks_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are called: `module`, or its members where it is a mere container."""
    if type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [network for member in module.children() for network in networks_of(member)]
    return [module]


def forget_gathered(module: nn.Module) -> None:
    """Let a module that `Processes.distribute` has spread gather its weights anew at its next forward.

    FSDP2 frees what the outermost module of a network has gathered only after a backward pass; after a forward alone,
    the next one would run with the weights as they were, whatever has been written to the shards since.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


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


def _as_autocast(_norm: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    # Autocast norms in float32 on a GPU. Diffusers' backward pass of shared attention is outside of autocast, where
    # queries, keys and values have to be of one dtype: the one in which attention is computed anyway.
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def _check_groups(count: int, context_parallel: int) -> None:
    if count % context_parallel:
        msg = (
            f"context_parallel {context_parallel} does not divide {count} processes; set it to 1, or start a multiple "
            "of it with torchrun"
        )
        raise ConfigurationError(msg)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)
