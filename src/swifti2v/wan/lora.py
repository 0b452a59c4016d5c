"""LoRA files for Wan transformers: read in every format met in the wild, and applied wholly or not at all.

Scale: ``W += strength * alpha / rank * up @ down``, with a factor of 1 where a file gives no alpha; additive parts are
multiplied by `strength` only. Arithmetic is float32, rounded once to the weight's dtype. Keys are read in
`lora_keys.py`.

Typical use::

    file = read_adapter_file("lora.safetensors")
    fuse(transformer, load_adapter(file, transformer))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swifti2v.errors import AdapterError
from swifti2v.wan.lora_keys import (
    OTHER_METHODS,
    Expert,
    ExpertChoice,
    ModuleNames,
    route_experts,
    some_of,
    split_key,
)

_METADATA_KEY = "lora_adapter_metadata"
_KNOWN_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_FUSABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ------------------------------------------------------------------------------------------------------ the change


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """A low-rank change of one weight: ``scale * up @ down``.

    Args:
        down: ``[rank, in]``, or ``[rank, in, *kernel]`` for a convolution.
        up: ``[out, rank]``, or with a kernel of ones for a convolution.
        scale: alpha / rank (alpha / sqrt(rank) for rs-LoRA), 1 where the file gives no alpha.
        magnitude: of a DoRA (arXiv 2402.09353), ``[out]``: the changed weight is scaled to these norms of its rows.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.down.shape[0]

    def change(self, weight: Tensor) -> Tensor:
        """Return the change of `weight`: float32, of its shape and on its device."""
        down, up = (part.flatten(1).to(weight.device, torch.float32) for part in (self.down, self.up))
        with torch.autocast(weight.device.type, enabled=False):
            change = (up @ down).mul_(self.scale).view(weight.shape)
        if self.magnitude is None:
            return change
        exact = weight.to(torch.float32)
        changed = (change + exact).flatten(1)
        wanted = self.magnitude.to(changed).flatten().unsqueeze(1)
        changed *= wanted / changed.norm(dim=1, keepdim=True)
        return changed.view(weight.shape) - exact


@dataclass(frozen=True, eq=False)
class ProductDelta:
    """A change of one weight that is a product of two matrices: LoHa or LoKr (LyCORIS, arXiv 2309.14859).

    Args:
        first, second: each a matrix, or a pair whose product it is.
        scale: alpha / rank, 1 where the file gives no alpha or neither matrix is a pair.
        is_kronecker: LoKr, the Kronecker product; otherwise LoHa, the product of elements.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float
    is_kronecker: bool

    def change(self, weight: Tensor) -> Tensor:
        """Return the change of `weight`: float32, of its shape and on its device."""
        with torch.autocast(weight.device.type, enabled=False):
            first, second = (
                reduce(torch.matmul, [part.flatten(1).to(weight.device, torch.float32) for part in parts])
                for parts in (self.first, self.second)
            )
            product = torch.kron(first, second) if self.is_kronecker else first * second
        return product.mul_(self.scale).view(weight.shape)


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A LoRA file, read for one network.

    Args:
        deltas: changes of weights, by module name (diffusers' naming).
        diffs: additive changes, by parameter name (diffusers' naming), of the parameter's shape.
        notes: what was left out on purpose, one sentence each.
    """

    deltas: Mapping[str, LoraDelta | ProductDelta]
    diffs: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@torch.no_grad()
def fuse(model: nn.Module, adapter: AdapterWeights, *, strength: float = 1.0) -> None:
    """Add `adapter` to the weights of `model` for good.

    Fuse before quantizing and before offloading. Several adapters may be fused one after another.

    Raises:
        AdapterError: a weight is quantized or on the meta device (nothing is changed then).
    """
    names = dict.fromkeys([*(f"{name}.weight" for name in adapter.deltas), *adapter.diffs])
    parameters = {name: _parameter(model, name) for name in names}
    for name, parameter in parameters.items():
        if parameter.dtype not in _FUSABLE or parameter.is_meta:
            where = f"{parameter.dtype} on {parameter.device}"
            msg = f"cannot fuse a LoRA into {name}, which is {where}; fuse it before quantizing or offloading the model"
            raise AdapterError(msg)
    for name, parameter in parameters.items():
        parameter.copy_(fused_weight(parameter, name, adapter, strength=strength))


@torch.no_grad()
def fused_weight(weight: Tensor, name: str, adapter: AdapterWeights, *, strength: float = 1.0) -> Tensor:
    """Return `weight`, which a model calls `name`, as `fuse` leaves it; for weights that are not in their model yet."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in adapter.deltas:
        change = adapter.deltas[module].change(weight).mul_(strength)
        weight = change.add_(weight).to(weight.dtype)
    if name in adapter.diffs:
        weight = (adapter.diffs[name].to(weight.device, torch.float32) * strength).add_(weight).to(weight.dtype)
    return weight


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by its name without PEFT, wherever PEFT has put it."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    parameter: nn.Parameter = getattr(module, leaf)
    return parameter


# -------------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class AlphaRule:
    """How a LoRA's scale follows from its rank where the file's own `.alpha` keys do not say it.

    Args:
        alpha: for every module, or None: unknown, and the scale is 1.
        alpha_pattern: PEFT's exceptions, regular expression of a module name -> alpha.
        rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, module: str, rank: int, file_alpha: float | None) -> float:
        """Return the scale of the LoRA of `module`; an alpha of 0 turns it off.

        Raises:
            AdapterError: alpha is negative or not finite, or rs-LoRA is asked for and alpha is not known.
        """
        alpha = file_alpha if file_alpha is not None else self._alpha_of(module)
        if alpha is None:
            if self.rslora:
                msg = "the LoRA is to be scaled as rs-LoRA but its file gives no alpha; pass alpha="
                raise AdapterError(msg)
            return 1.0
        if not (math.isfinite(alpha) and alpha >= 0):
            msg = f"alpha of {module} is {alpha}; it must be at least 0: the LoRA file is damaged"
            raise AdapterError(msg)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _alpha_of(self, module: str) -> float | None:
        # PEFT's rule: the pattern is the whole name or what follows a dot.
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The tensors of a LoRA file as they stand in it, and what its metadata says about the scale."""

    source: str
    state_dict: Mapping[str, Tensor]
    rule: AlphaRule = field(default_factory=AlphaRule)


def read_adapter_file(path: str | Path, *, alpha: float | None = None, rslora: bool | None = None) -> AdapterFile:
    """Read a `.safetensors` LoRA file, or a folder that diffusers or PEFT saved one in.

    Alpha comes, in this order, from `.alpha` keys, from diffusers' metadata, from PEFT's `adapter_config.json`
    beside `adapter_model.safetensors`, from `alpha`.

    Args:
        path: file or folder.
        alpha: for a file that does not give its own; None: scale 1.
        rslora: scale by alpha / sqrt(rank); None: as the file's metadata says.

    Raises:
        AdapterError: missing, not safetensors, corrupt or truncated; metadata that cannot be read, or that
            calls a file without magnitudes a DoRA.
    """
    file = _adapter_path(Path(path))
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            state_dict = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"cannot read the LoRA file {file} ({reason}); it is damaged or not safetensors: get it again"
        raise AdapterError(msg) from error
    settings = _settings(file, metadata)
    if settings.get("use_dora") and not any((split_key(key) or ("", ""))[1] == "magnitude" for key in state_dict):
        msg = f"{file} is a DoRA by its settings, and holds no magnitudes; the file is incomplete: get it again"
        raise AdapterError(msg)
    own_alpha = settings.get("lora_alpha")
    rule = AlphaRule(
        alpha=alpha if own_alpha is None else own_alpha,
        alpha_pattern=settings.get("alpha_pattern", {}),
        rslora=bool(settings.get("use_rslora")) if rslora is None else rslora,
    )
    return AdapterFile(source=str(path), state_dict=state_dict, rule=rule)


def _adapter_path(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _KNOWN_FILES if (path / name).is_file()]
        if not found:
            msg = f"{path} holds none of {', '.join(_KNOWN_FILES)}; pass the LoRA file itself"
            raise AdapterError(msg)
        return found[0]
    if not path.is_file():
        msg = f"there is no LoRA file {path}; check the path"
        raise AdapterError(msg)
    if path.suffix != ".safetensors":
        msg = (
            f"{path} is not a .safetensors file; pickled LoRAs can run code when read: convert it to safetensors first"
        )
        raise AdapterError(msg)
    return path


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings of the adapter, from diffusers' metadata or PEFT's own file; empty if there are none."""
    source, text = f"the metadata of {file}", metadata.get(_METADATA_KEY)
    config = file.with_name("adapter_config.json")
    if text is None and file.name == "adapter_model.safetensors" and config.is_file():
        source, text = str(config), config.read_text(encoding="utf-8")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
        # diffusers puts the component's name before every setting; its files hold one component each.
        plain = {key.removeprefix("transformer_2.").removeprefix("transformer."): settings[key] for key in settings}
        if plain.get("lora_alpha") is not None:
            plain["lora_alpha"] = float(plain["lora_alpha"])
        plain["alpha_pattern"] = {key: float(value) for key, value in (plain.get("alpha_pattern") or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        msg = f"{source} does not hold LoRA settings ({error}); save the LoRA again with diffusers or PEFT"
        raise AdapterError(msg) from error
    return plain


# ------------------------------------------------------------------------------------------- a file for a network


def load_adapter(file: AdapterFile, model: nn.Module, *, expert: ExpertChoice = "both") -> AdapterWeights:
    """Read `file` for one transformer, all of it.

    Args:
        file: of `read_adapter_file`.
        model: diffusers' `WanTransformer3DModel` or a subclass, perhaps on the meta device.
        expert: which half to take of a file that holds both experts; files of one expert ignore it.

    Raises:
        AdapterError: the file does not match the network wholly, or holds both experts and `expert` is "both".
    """
    routed = route_experts(file.state_dict)
    state_dict: Mapping[str, Tensor] = file.state_dict
    if routed is not None:
        if expert == "both" or expert not in routed:
            msg = f"{file.source}: holds the experts {', '.join(sorted(routed))}; choose one of them for this network"
            raise AdapterError(msg)
        state_dict = routed[expert]
    try:
        return normalize(state_dict, model, rule=file.rule)
    except AdapterError as error:
        msg = f"{file.source}: {error}"
        raise AdapterError(msg) from error


def adapters_of_experts(
    file: AdapterFile, experts: Mapping[Expert, nn.Module], *, expert: ExpertChoice = "both"
) -> dict[Expert, AdapterWeights]:
    """Read `file` for the experts it is meant for; nothing is applied, so an error leaves every network as it was.

    Args:
        file: of `read_adapter_file`, for one expert or for both.
        experts: the networks at hand: `{"high": pipeline.transformer, "low": pipeline.transformer_2}`.
        expert: "high" or "low": for that one only; "both": a file of both experts half to each, any other file whole
            to each.

    Raises:
        AdapterError: an unknown or missing expert, or the file does not match wholly.
    """
    if expert not in get_args(ExpertChoice):
        msg = f"{file.source}: expert {expert!r} is not one of high, low, both"
        raise AdapterError(msg)
    held = route_experts(file.state_dict)
    chosen: list[Expert] = [name for name in get_args(Expert) if expert in (name, "both")]
    if expert == "both":
        chosen = list(held) if held is not None else [name for name in chosen if name in experts]
    if missing := [name for name in chosen if name not in experts]:
        msg = f"{file.source}: is meant for the {missing[0]}-noise expert, which this model does not have"
        raise AdapterError(msg)
    return {name: load_adapter(file, experts[name], expert=name) for name in chosen}


def normalize(state_dict: Mapping[str, Tensor], model: nn.Module, *, rule: AlphaRule | None = None) -> AdapterWeights:
    """Read the tensors of a LoRA file for `model`, all of them.

    Args:
        state_dict: keys of any supported format, for one expert only (`route_experts`).
        model: see `load_adapter`.
        rule: the scale where the file has no `.alpha` keys.

    Raises:
        AdapterError: a key is left over, a group of tensors is incomplete, a shape does not match, nothing matches.
    """
    names = ModuleNames(model)
    parts, notes = _collect(state_dict, names)
    deltas: dict[str, LoraDelta | ProductDelta] = {}
    diffs: dict[str, Tensor] = {}
    for target, tensors in parts.items():
        delta = _delta_of(target, tensors, names, rule or AlphaRule())
        if delta is not None:
            deltas[target] = delta
        for parameter, diff in _diffs_of(target, tensors, delta, names):
            diffs[parameter] = diffs[parameter] + diff if parameter in diffs else diff
    if not deltas and not diffs:
        msg = f"the file holds no LoRA weights for {names.model_name}; use a LoRA made for Wan transformers"
        raise AdapterError(msg)
    return AdapterWeights(deltas=deltas, diffs=diffs, notes=notes)


def _collect(
    state_dict: Mapping[str, Tensor], names: ModuleNames
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Return the tensors by target and part, and notes on what was left out."""
    parts: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    ignored: list[str] = []
    for key, tensor in state_dict.items():
        place = names.locate(key)
        if place is None:
            (ignored if names.lacks_image_branch_of(key) else left_over).append(key)
            continue
        target, part = place
        if part in parts.setdefault(target, {}):
            msg = f"{key} is a second {part} for {target}: the file holds several LoRAs; split it into one file each"
            raise AdapterError(msg)
        if not (tensor.is_floating_point() or part == "alpha") or not bool(torch.isfinite(tensor.float()).all()):
            msg = f"{key} holds {tensor.dtype} values that are not finite numbers; the file is damaged: get it again"
            raise AdapterError(msg)
        parts[target][part] = tensor
    if left_over:
        which = f"{len(left_over)} of {len(state_dict)} keys"
        if any(OTHER_METHODS.search(key) for key in left_over):
            msg = (
                f"{which} are not of a LoRA, LoHa, LoKr or DoRA ({some_of(left_over)}); "
                "merge the file into a plain LoRA with the tool that made it"
            )
        else:
            msg = (
                f"{which} belong to no module of this {names.model_name} ({some_of(left_over)}); "
                "use a LoRA made for this network"
            )
        raise AdapterError(msg)
    if not ignored:
        return parts, ()
    note = f"left out {len(ignored)} keys of the CLIP image branch, which this network lacks: {some_of(ignored)}"
    return parts, (note,)


def _delta_of(
    target: str, tensors: Mapping[str, Tensor], names: ModuleNames, rule: AlphaRule
) -> LoraDelta | ProductDelta | None:
    """Return the change of the weight of `target`; None if `tensors` hold differences only.

    Raises:
        AdapterError: tensors are missing or of several methods, or do not fit the weight.
    """
    given = tensors.keys() - {"diff", "diff_bias"}
    if not given:
        return None
    method = next((name for name in ("hada", "lokr") if any(part.startswith(name) for part in given)), None)
    factors = [("up", "down")] if method is None else [_factor(f"{method}_w{place}", given) for place in (1, 2)]
    needed = {part for factor in factors for part in factor}
    allowed = needed | {"alpha"} | ({"magnitude", "up_bias"} if method is None else set())
    if needed - given or given - allowed:
        has, lacks = ", ".join(sorted(tensors)), ", ".join(sorted(needed - given)) or "nothing"
        msg = f"the LoRA of {target} has {has} but lacks {lacks}; the file is incomplete or mixed: get it again"
        raise AdapterError(msg)
    shape = names.shapes[f"{target}.weight"]
    held = [[tensors[part] for part in factor] for factor in factors]
    if not _fits(shape, held, tensors, method):
        found = ", ".join(f"{part} {list(tensors[part].shape)}" for part in sorted(given))
        msg = f"the LoRA of {target} has {found}, which do not fit its weight {list(shape)}; use one of this size"
        raise AdapterError(msg)
    alpha = tensors["alpha"].item() if "alpha" in tensors else None
    if method is None:
        scale = rule.scale(target, tensors["down"].shape[0], alpha)
        return LoraDelta(tensors["down"], tensors["up"], scale, tensors.get("magnitude"))
    # As in LyCORIS: the rank is that of the pairs, and two whole matrices are not scaled.
    ranks = [parts[1].shape[0] for parts in held if len(parts) > 1]
    scale = rule.scale(target, ranks[-1], alpha) if ranks else 1.0
    return ProductDelta(tuple(held[0]), tuple(held[1]), scale, is_kronecker=method == "lokr")


def _factor(name: str, given: Set[str]) -> tuple[str, ...]:
    return (name,) if name in given else (f"{name}_a", f"{name}_b")


def _fits(shape: torch.Size, factors: list[list[Tensor]], tensors: Mapping[str, Tensor], method: str | None) -> bool:
    """Return whether a change made of `factors` has the `shape` of its weight, and alpha and magnitude theirs."""
    parts = [part for factor in factors for part in factor]
    if min(part.ndim for part in parts) < 2 or any(
        factor[0].flatten(1).shape[1] != factor[1].shape[0] for factor in factors if len(factor) > 1
    ):
        return False
    sizes = [(factor[0].shape[0], factor[-1].flatten(1).shape[1]) for factor in factors]
    if method == "lokr":
        sizes = [(sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])]
    magnitude, down = tensors.get("magnitude"), tensors.get("down")
    return (
        set(sizes) == {(shape[0], math.prod(shape[1:]))}
        and (down is None or down.ndim == 2 or down.shape[1:] == shape[1:])
        and ("alpha" not in tensors or tensors["alpha"].numel() == 1)
        and (magnitude is None or (magnitude.shape[0] == magnitude.numel() == shape[0]))
    )


def _diffs_of(
    target: str, tensors: Mapping[str, Tensor], delta: LoraDelta | ProductDelta | None, names: ModuleNames
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    if "diff" in tensors:
        found.append((target if target in names.shapes else f"{target}.weight", tensors["diff"]))
    if "diff_bias" in tensors:
        found.append((f"{target}.bias", tensors["diff_bias"]))
    if "up_bias" in tensors and delta is not None:
        # PEFT scales the bias of the up matrix with the matrix (`lora_bias=True`).
        found.append((f"{target}.bias", tensors["up_bias"].float() * delta.scale))
    return [(name, _fitted(name, tensor, names.shapes[name])) for name, tensor in found]


def _fitted(name: str, diff: Tensor, shape: torch.Size) -> Tensor:
    # Modulation tables are stored as [6, D] or [1, 6, D]: the same numbers in the same order.
    if [side for side in diff.shape if side != 1] == [side for side in shape if side != 1]:
        return diff.reshape(shape)
    msg = (
        f"the difference for {name} is {list(diff.shape)}, the parameter {list(shape)}; "
        "use a LoRA made for a network of this size"
    )
    raise AdapterError(msg)
