"""The part of a run that changes: trained weights and their average, whole or spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.distributed import placed_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen.

    Raises:
        ConfigurationError: there are none, or one is not float32 (it would be its own, too coarse, master weight).
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            msg = f"the trained {name} is {parameter.dtype}; load it in float32, the option bfloat16 does the rest"
            raise ConfigurationError(msg)
    if not named:
        msg = "nothing is trained: every parameter is frozen; unfreeze a part or add a LoRA"
        raise ConfigurationError(msg)
    return list(named.values())


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers by name; frozen parameters come from where they came from."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_own_state(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into `module`, wherever its own are; raise `ValueError` unless names and shapes match."""
    current = module.state_dict()
    if unknown := sorted(saved.keys() - current.keys()) or sorted(own_state(module).keys() - saved.keys()):
        msg = f"{len(unknown)} of its weights do not match, {unknown[0]} for one"
        raise ValueError(msg)
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape:
            msg = f"{name} is {list(tensor.shape)} in it, {list(current[name].shape)} here"
            raise ValueError(msg)
        current[name].copy_(placed_like(current[name], tensor))


def placed_average(saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return the state of a diffusers `EMAModel` with its tensors placed as `parameters` are."""
    pairs = zip(parameters, saved["shadow_params"], strict=True)
    return dict(saved) | {"shadow_params": [placed_like(parameter, tensor) for parameter, tensor in pairs]}
