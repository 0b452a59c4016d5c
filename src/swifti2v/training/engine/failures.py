"""What was in the batch that broke a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swifti2v.training.engine.distributed import networks_of, whole

if TYPE_CHECKING:
    from pathlib import Path


class InputRecorder:
    """Remembers the tensors that the networks of an objective were last called with (references, no copies)."""

    def __init__(self, module: nn.Module) -> None:
        self._inputs: dict[str, Tensor] = {}
        names = {id(member): name for name, member in module.named_modules()}
        for network in networks_of(module):
            name = names[id(network)] or type(network).__name__
            network.register_forward_pre_hook(self._hook(name), with_kwargs=True)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Tensors by ``network.argument``; arguments without a name by their place."""
        return dict(self._inputs)

    def _hook(self, name: str) -> Any:
        def remember(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            arguments = {str(place): value for place, value in enumerate(positional)} | named
            for argument, value in arguments.items():
                if isinstance(value, Tensor):
                    self._inputs[f"{name}.{argument}"] = value

        return remember


def save_failure(path: Path, *, step: int, draw: int, seed: int, loss: float, inputs: dict[str, Tensor]) -> None:
    """Write what is needed to look at a batch again; read it with ``torch.load(path)``.

    Args:
        path: of the file.
        step: optimizer step, from 0.
        draw: number of the batch, as the objective got it.
        seed: of the loop.
        loss: the value that is not finite.
        inputs: of `InputRecorder`.
    """
    torch.save({"step": step, "draw": draw, "seed": seed, "loss": loss, "tensors": whole(inputs)}, path)
