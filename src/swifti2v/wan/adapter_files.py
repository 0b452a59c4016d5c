"""LoRA files on disk: reading them, what their metadata says about the scale, and which expert they are for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from swifti2v.errors import AdapterError
from swifti2v.wan.adapter_keys import AdapterWeights, AlphaRule, normalise

if TYPE_CHECKING:
    from torch import Tensor, nn

Expert = Literal["high", "low"]
ExpertChoice = Literal["high", "low", "both"]

_METADATA_KEY = "lora_adapter_metadata"
_KNOWN_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# ai-toolkit writes `.transformer_1.` (high noise) and `.transformer_2.` (low noise) right after its prefix.
_EXPERT_IN_KEY = re.compile(
    r"^((?:diffusion_model|transformer|base_model\.model|lora_unet|lycoris)[._]+)?transformer_([12])[._]"
)


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
        alpha: of a file that does not say its own; None: scale 1.
        rslora: scale by alpha / sqrt(rank); None: as the file's metadata says.

    Raises:
        AdapterError: missing, not safetensors, corrupt or truncated; metadata that cannot be read; a DoRA.
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
    if settings.get("use_dora"):
        msg = f"{file} is a DoRA, which is not supported; merge it into a plain LoRA with the tool that made it"
        raise AdapterError(msg)
    rule = AlphaRule(
        alpha=settings.get("lora_alpha") or alpha,
        alpha_pattern=settings.get("alpha_pattern", {}),
        rslora=bool(settings.get("use_rslora")) if rslora is None else rslora,
    )
    return AdapterFile(source=str(path), state_dict=state_dict, rule=rule)


def route_experts(state_dict: Mapping[str, Tensor]) -> dict[Expert, dict[str, Tensor]] | None:
    """Split a file that holds both experts of Wan2.2-A14B (ai-toolkit); None if its keys name no expert.

    Returns:
        Keys without the expert's name, by expert; `transformer_1` is the high-noise one.

    Raises:
        AdapterError: some keys name an expert and others do not.
    """
    routed: dict[Expert, dict[str, Tensor]] = {}
    others: list[str] = []
    # diffusers names a pipeline's transformers `transformer.` and `transformer_2.`; one alone does not tell the expert.
    by_component = any(key.startswith("transformer_2.") for key in state_dict)
    for key, tensor in state_dict.items():
        match = _EXPERT_IN_KEY.match(key)
        if match is not None:
            expert: Expert = "high" if match[2] == "1" else "low"
            routed.setdefault(expert, {})[(match[1] or "") + key[match.end() :]] = tensor
        elif by_component and key.startswith("transformer."):
            routed.setdefault("high", {})[key] = tensor
        else:
            others.append(key)
    if not routed:
        return None
    if others:
        msg = (
            f"{len(others)} of {len(state_dict)} keys name no expert although the others do "
            f"({', '.join(others[:3])}); split the file into one for each expert"
        )
        raise AdapterError(msg)
    return routed


def load_adapter(file: AdapterFile, model: nn.Module, *, expert: ExpertChoice = "both") -> AdapterWeights:
    """Read `file` for one transformer, all of it.

    Args:
        file: of `read_adapter_file`.
        model: diffusers' `WanTransformer3DModel` or a subclass.
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
        return normalise(state_dict, model, rule=file.rule)
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
        expert: "high" or "low": apply to that one only; "both": a file of both experts half to each, any other
            file whole to each.

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
    """PEFT's settings of the adapter, from diffusers' metadata or from PEFT's own file; empty if there are none."""
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
