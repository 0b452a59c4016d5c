"""LoRA files for Wan transformers: read every format met in the wild, apply all of it or nothing.

Two ways to apply one: `fuse` adds it to the weights for good (computed in float32; what generation uses: no cost per
step, works with offloading); `attach` keeps it apart and returns an `AttachedAdapter` that can be scaled, switched off
and removed again, exactly. Low-rank parts are then PEFT layers of the model; additive parts (`.diff` keys), which PEFT
cannot hold, are added to the parameters while their former values are kept.

Scale: ``W += strength * alpha / rank * up @ down``, and factor 1 where a file gives no alpha; additive parts are
multiplied by `strength` only.

Typical use::

    file = read_adapter_file("lora.safetensors")
    fuse(transformer, load_adapter(file, transformer))
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from swifti2v.errors import AdapterError
from swifti2v.wan.adapter_files import (
    AdapterFile,
    Expert,
    ExpertChoice,
    adapters_of_experts,
    load_adapter,
    read_adapter_file,
    route_experts,
)
from swifti2v.wan.adapter_keys import AdapterWeights, AlphaRule, LoraDelta, normalise

__all__ = [
    "AdapterFile",
    "AdapterWeights",
    "AlphaRule",
    "AttachedAdapter",
    "Expert",
    "ExpertChoice",
    "LoraDelta",
    "adapters_of_experts",
    "attach",
    "fuse",
    "fused_weight",
    "load_adapter",
    "normalise",
    "read_adapter_file",
    "route_experts",
]

_FUSABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def fuse(model: nn.Module, adapter: AdapterWeights, *, strength: float = 1.0) -> None:
    """Add `adapter` to the weights of `model` for good; float32 arithmetic, rounded once to the weight's dtype.

    Fuse before quantising and before offloading. Adapters may be fused one after another, also into a model that has
    attached ones.

    Raises:
        AdapterError: a weight is quantised or on the meta device (nothing is changed then).
    """
    parameters = {name: _parameter(model, f"{name}.weight") for name in adapter.deltas}
    changed = {name: _parameter(model, name) for name in adapter.diffs}
    for name, parameter in (parameters | changed).items():
        if parameter.dtype not in _FUSABLE or parameter.is_meta:
            where = f"{parameter.dtype} on {parameter.device}"
            msg = f"cannot fuse a LoRA into {name}, which is {where}; fuse it before quantising or offloading the model"
            raise AdapterError(msg)
    for name, delta in adapter.deltas.items():
        weight = parameters[name]
        _change(model, f"{name}.weight", delta.dense(weight.shape, weight.device).mul_(strength))
    for name, diff in adapter.diffs.items():
        _change(model, name, diff.to(changed[name].device, torch.float32) * strength)


@torch.no_grad()
def fused_weight(weight: Tensor, name: str, adapter: AdapterWeights, *, strength: float = 1.0) -> Tensor:
    """Return `weight`, which a model calls `name`, as `fuse` leaves it; for weights that are not in their model yet."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in adapter.deltas:
        change = adapter.deltas[module].dense(weight.shape, weight.device).mul_(strength)
        weight = change.add_(weight).to(weight.dtype)
    if name in adapter.diffs:
        weight = (adapter.diffs[name].to(weight.device, torch.float32) * strength).add_(weight).to(weight.dtype)
    return weight


def attach(model: Any, adapter: AdapterWeights, *, name: str, strength: float = 1.0) -> AttachedAdapter:
    """Put `adapter` on `model` so that it can be switched; adapters attached before stay as they are.

    Attach before offloading. Every PEFT layer of the adapter is frozen.

    Args:
        model: a diffusers model (PEFT's layers are put into it).
        adapter: of `load_adapter`.
        name: letters, digits, `_` and `-`; not in use on the model yet.
        strength: factor on the whole adapter.

    Raises:
        AdapterError: the name is in use or has other characters.
    """
    in_use = name in getattr(model, "peft_config", {}) or name in _ledger(model).diffs
    if in_use or re.fullmatch(r"[\w-]+", name) is None:
        msg = f"adapter name {name!r} is in use or has characters other than letters, digits, _ and -; choose another"
        raise AdapterError(msg)
    if adapter.deltas:
        _add_peft_layers(model, adapter, name)
    _ledger(model).put(model, name, adapter.diffs, strength)
    attached = AttachedAdapter(model, name, adapter.notes, strength)
    attached.set_strength(strength)
    return attached


class AttachedAdapter:
    """An adapter that is on a model and can be taken off it again; made by `attach`."""

    def __init__(self, model: Any, name: str, notes: tuple[str, ...], strength: float) -> None:
        self.name = name
        self.notes = notes
        self._model = model
        self._strength = strength
        self._enabled = True
        self._removed = False

    @property
    def enabled(self) -> bool:
        """Whether the adapter has an effect now."""
        return self._enabled and not self._removed

    @property
    def strength(self) -> float:
        """Factor on the whole adapter while it is enabled."""
        return self._strength

    def set_strength(self, strength: float) -> None:
        """Multiply the whole adapter by `strength` from now on."""
        self._strength = strength
        self._refresh()

    def enable(self) -> None:
        """Let the adapter have its effect again."""
        self._enabled = True
        self._refresh()

    def disable(self) -> None:
        """Take the effect away, exactly; the adapter stays in memory."""
        self._enabled = False
        self._refresh()

    def remove(self) -> None:
        """Take the adapter off the model; the model's weights and modules are what they were. Twice does nothing."""
        if self._removed:
            return
        self._removed = True
        _ledger(self._model).drop(self._model, self.name)
        if self.name in getattr(self._model, "peft_config", {}):
            active = [name for name in _active_adapters(self._model) if name != self.name]
            self._model.delete_adapters(self.name)
            if getattr(self._model, "peft_config", None):  # diffusers deletes it with the last adapter
                _activate(self._model, active)
            else:
                self._model.unload_lora()

    def _refresh(self) -> None:
        if self._removed:
            msg = f"adapter {self.name!r} has been removed from its model; attach it again"
            raise AdapterError(msg)
        _ledger(self._model).scale(self._model, self.name, self._strength if self._enabled else 0.0)
        if self.name not in getattr(self._model, "peft_config", {}):
            return
        others = [name for name in _active_adapters(self._model) if name != self.name]
        _activate(self._model, [*others, self.name] if self._enabled else others)
        for layer in _peft_layers(self._model):
            layer.set_scale(self.name, self._strength)


class _DiffLedger:
    """Additive parts of the attached adapters of one model, and the values that the parameters have without them.

    A parameter is always computed anew from its kept value, so adapters can be taken off in any order without
    rounding being left behind.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.diffs: dict[str, Mapping[str, Tensor]] = {}
        self._strengths: dict[str, float] = {}

    def put(self, model: nn.Module, adapter: str, diffs: Mapping[str, Tensor], strength: float) -> None:
        for name in diffs:
            if name not in self.kept:
                self.kept[name] = _parameter(model, name).detach().clone()
        self.diffs[adapter] = diffs
        self.scale(model, adapter, strength)

    def scale(self, model: nn.Module, adapter: str, strength: float) -> None:
        self._strengths[adapter] = strength
        for name in self.diffs[adapter]:
            self.rebuild(model, name)

    def drop(self, model: nn.Module, adapter: str) -> None:
        names = self.diffs.pop(adapter)
        del self._strengths[adapter]
        for name in names:
            self.rebuild(model, name)
            if not any(name in diffs for diffs in self.diffs.values()):
                del self.kept[name]

    @torch.no_grad()
    def rebuild(self, model: nn.Module, name: str) -> None:
        parameter = _parameter(model, name)
        value = self.kept[name].to(parameter.device, torch.float32, copy=True)
        for adapter, diffs in self.diffs.items():
            if name in diffs and self._strengths[adapter]:
                value.add_(diffs[name].to(value), alpha=self._strengths[adapter])
        parameter.copy_(value)

    def fold(self, model: nn.Module, name: str, change: Tensor) -> None:
        """Change the kept value: something was fused while adapters are attached."""
        kept = self.kept[name]
        kept.copy_(kept.to(change) + change)
        self.rebuild(model, name)


_LEDGERS: WeakKeyDictionary[nn.Module, _DiffLedger] = WeakKeyDictionary()


def _ledger(model: nn.Module) -> _DiffLedger:
    return _LEDGERS.setdefault(model, _DiffLedger())


def _change(model: nn.Module, name: str, change: Tensor) -> None:
    """Add `change` to a parameter for good, with or without additive parts of attached adapters on it."""
    ledger = _LEDGERS.get(model)
    if ledger is not None and name in ledger.kept:
        ledger.fold(model, name, change)
    else:
        parameter = _parameter(model, name)
        parameter.copy_(change.add_(parameter))


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Parameter by its name without PEFT, wherever PEFT has put it."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    parameter: nn.Parameter = getattr(module, leaf)
    return parameter


# ------------------------------------------------------------------------------------------------------- PEFT layers


def _add_peft_layers(model: Any, adapter: AdapterWeights, name: str) -> None:
    """Put the low-rank parts on the model, frozen, without touching which adapters are active or trained."""
    active = _active_adapters(model)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    # "^": PEFT reads the names as patterns that may begin after any dot.
    patterns = {module: f"^{re.escape(module)}" for module in adapter.deltas}
    config = LoraConfig(
        r=1,
        target_modules=list(adapter.deltas),
        rank_pattern={patterns[module]: delta.rank for module, delta in adapter.deltas.items()},
        alpha_pattern={patterns[module]: delta.scale * delta.rank for module, delta in adapter.deltas.items()},
    )
    with warnings.catch_warnings():
        # Several adapters on one model is what is wanted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(config, adapter_name=name)
    with torch.no_grad():
        for module, delta in adapter.deltas.items():
            layer = model.get_submodule(module)
            for matrix, values in ((layer.lora_A[name].weight, delta.down), (layer.lora_B[name].weight, delta.up)):
                matrix.copy_(values.reshape(matrix.shape))
    _activate(model, active)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _activate(model: nn.Module, names: list[str]) -> None:
    """Make exactly these adapters active; PEFT would also make them trainable, here that stays as it was."""
    for layer in _peft_layers(model):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        layer.set_adapter(names, inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_(True)


def _active_adapters(model: nn.Module) -> list[str]:
    layer = next(_peft_layers(model), None)
    return [] if layer is None else list(layer.active_adapters)


def _peft_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
