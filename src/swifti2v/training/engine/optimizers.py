"""The optimizer of a run, and its state as whole tensors in a checkpoint.

`adamw` is PyTorch's. `adamw8bit` is torchao's, which works with sharded weights and on every device: moments in 8 bits
with a float32 scale for each 256 weights, a quarter of their memory. It is kept to weights whose rows divide into such
blocks, so that a shard, which is made of rows, never ends within one; others (biases, one matrix of a LoRA) have plain
moments.

A checkpoint holds every moment in float32, so that a run may go on with the other optimizer or on another number of
processes; beside those of 8 bits stand their scales, with which the same bits are found again.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.distributed import placed_like, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

Optimizer = Literal["adamw", "adamw8bit"]
STEP, SIGNED_MOMENT, SCALES = "step", "exp_avg", "_scales"


def make_optimizer(
    name: Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.Optimizer:
    """Make an optimizer of one group.

    Raises:
        ConfigurationError: what it needs is not installed.
    """
    optimizer: Any = torch.optim.AdamW if name == "adamw" else _eight_bit_class()
    made: torch.optim.Optimizer = optimizer(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas)
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the rate of the next steps."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # of torchao's, which is compiled for its place and not its value
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def take_step(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Change the weights by their gradients."""
    # torchao compiles its step, which a GPU needs; on a CPU that takes longer than many steps as they are.
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext():
        optimizer.step()


@torch.no_grad()
def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """Return the state by places of parameters, whole float32 tensors on the CPU; all processes have to ask.

    Args:
        optimizer: of `make_optimizer`.
        keep: False in processes that do not write it; they get None for each tensor.
    """
    state = {
        place: {
            key: whole(value, keep=keep)
            for name, moment in optimizer.state[parameter].items()
            for key, value in _plain(name, moment, parameter, _blocks_of_a_row(optimizer, parameter))
        }
        for place, parameter in enumerate(_parameters(optimizer))
        if parameter in optimizer.state
    }
    return {"state": state}


@torch.no_grad()
def load_whole_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put a state of `whole_state` (or of PyTorch's AdamW) into an optimizer, spread as its parameters are."""
    for place, parameter in enumerate(_parameters(optimizer)):
        if place in saved["state"]:
            entry = saved["state"][place]
            names = [name for name in entry if not name.endswith(SCALES)]
            optimizer.state[parameter] = {name: _placed(optimizer, parameter, name, entry) for name in names}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    (group,) = optimizer.param_groups
    parameters: list[nn.Parameter] = group["params"]
    return parameters


def _eight_bit_class() -> Any:
    try:
        base: Any = import_module("torchao.optim").AdamW8bit
    except ImportError as error:
        msg = "optimizer adamw8bit needs torchao, which is missing: pip install 'swifti2v[adamw8bit]', or use adamw"
        raise ConfigurationError(msg) from error

    class RowwiseAdamW8bit(base):
        """Moments in 8 bits where rows divide into blocks."""

        @staticmethod
        def _subclass_zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
            if prod(parameter.shape[1:]) % block_size:
                return torch.zeros_like(parameter)
            zeros: Tensor = base._subclass_zeros(parameter, signed, block_size)
            return zeros

    return RowwiseAdamW8bit


def _blocks_of_a_row(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """Return how many blocks of 8 bits a row has; 0: its moments are plain. The same in every process."""
    block_size = getattr(optimizer, "block_size", None)
    row = prod(parameter.shape[1:])
    return row // block_size if block_size and row % block_size == 0 else 0


def _plain(name: str, moment: Tensor, parameter: nn.Parameter, blocks: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a moment in float32, and its scales ``[rows, blocks]`` if it has blocks, spread as its parameter is."""
    if name == STEP or not blocks:
        yield name, moment
        return
    local = _local(moment)
    has_scales = hasattr(local, "scale")
    yield name, _spread_as(parameter, local.dequantize() if has_scales else local, tuple(parameter.shape))
    # A shard too small for 8 bits says so by zeros.
    shape = (local.shape[0], blocks)
    scales = local.scale.view(shape) if has_scales else torch.zeros(shape, device=local.device)
    yield f"{name}{SCALES}", _spread_as(parameter, scales, (parameter.shape[0], blocks))


def _placed(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, entry: Mapping[str, Tensor]
) -> Tensor:
    value = entry[name]
    if name == STEP:
        return value.clone()  # a single number belongs to no place
    if not _blocks_of_a_row(optimizer, parameter):
        return placed_like(parameter, value)
    made: Any = optimizer
    moment: Tensor = made._new_buffer(parameter, name == SIGNED_MOMENT)
    local, values = _local(moment), _local(placed_like(parameter, value))
    scales = _local(placed_like(parameter, entry[f"{name}{SCALES}"])) if f"{name}{SCALES}" in entry else None
    if not hasattr(local, "scale") or scales is None or not bool((scales > 0).all()):
        local.copy_(values)  # rounds anew what was not in 8 bits, or has become so
        return moment
    # The levels as they were: rounding the values anew would take another scale where the largest one is negative.
    between = (local.qmap[1:] + local.qmap[:-1]) / 2
    levels = torch.searchsorted(between, values.view(scales.numel(), -1) / scales.view(-1, 1))
    local.codes.copy_(levels.view(values.shape))
    local.scale.copy_(scales.view(-1))
    return moment


def _local(tensor: Tensor) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread_as(parameter: nn.Parameter, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the parts of all processes as one tensor, or the only part as it is."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
