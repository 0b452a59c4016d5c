"""Stage I's pipeline from its files: network by network, so that the host holds one of them as it is stored.

Two experts, text encoder and codec are 69 GB in bfloat16. Each is loaded, checked, given its adapters and handed over
(to be stored in float8, or moved to the device) before the next one is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights

from swifti2v.errors import CheckpointError
from swifti2v.wan.adapters import adapters_of_experts, fuse, read_adapter_file
from swifti2v.wan.checkpoint_files import as_checkpoint_error, check_weights_loaded, read_json, stored_names

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import WanImageToVideoPipeline
    from torch import nn

    from swifti2v.wan.adapters import AdapterWeights, Expert
    from swifti2v.wan.checkpoints import ResolvedCheckpoint

logger = logging.getLogger(__name__)

Settle = Callable[[str, "nn.Module"], object]
"""``(name in the pipeline, network)``: called with each network once it is as it will be run, and alone."""

_PIPELINE = "WanImageToVideoPipeline"
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "image_processor")
EXPERT_OF: dict[str, Expert] = {"transformer": "high", "transformer_2": "low"}


def _leave(_name: str, _network: nn.Module) -> None:
    """Do nothing: all networks stay on the host as they were loaded."""


def load_stage_one_pipeline(
    resolved: ResolvedCheckpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.float32,
    roles: Collection[str] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    settle: Settle = _leave,
) -> WanImageToVideoPipeline:
    """Load Stage I with its adapters fused.

    Args:
        resolved: with the part "stage_one".
        dtype: of transformers and text encoder.
        vae_dtype: of the codec; Wan's own code runs it in float32.
        roles: adapters of these roles are applied; None: all. Without "few_step" it is a many-step model.
        networks: components that are loaded already (`read_stage_one_networks`), the adapters in them.
        settle: moves a network that is loaded here, or changes how it is stored, before the next one is loaded.

    Raises:
        CheckpointError: missing or damaged files, another pipeline class, weights that do not belong.
        AdapterError: an adapter that does not match.
    """
    from diffusers import WanImageToVideoPipeline

    folder = resolved.folder_of("stage_one")
    classes = network_classes(folder)
    stored = {name: stored_names(folder / name) for name in classes}
    loaded: dict[str, Any] = dict(networks or {})
    missing = {name: network_class for name, network_class in classes.items() if name not in loaded}
    # Adapters are read before any network is: of the experts they need names and shapes.
    experts = _empty_experts(folder, missing)
    planned = planned_adapters(experts, resolved, roles) if experts else []
    # The largest first, while the rest of the host is free: what they are loaded as may be twice what is kept of them.
    for name, network_class in sorted(missing.items(), key=lambda item: (item[0] not in EXPERT_OF, item[0])):
        with as_checkpoint_error(folder / name):
            loaded[name] = network = network_class.from_pretrained(
                str(folder / name),
                dtype=vae_dtype if name == "vae" else dtype,
                local_files_only=True,
                use_safetensors=True,
            )
        check_weights_loaded(network, stored[name], folder / name)
        if name in EXPERT_OF:
            for note in _fused(network, EXPERT_OF[name], planned):
                logger.info(note)
        settle(name, network)
    with as_checkpoint_error(folder):
        return WanImageToVideoPipeline.from_pretrained(str(folder), local_files_only=True, **loaded)


def apply_adapters(
    pipeline: WanImageToVideoPipeline, resolved: ResolvedCheckpoint, *, roles: Collection[str] | None = None
) -> tuple[str, ...]:
    """Fuse the checkpoint's adapters of `roles` (None: all) into the experts of `pipeline`.

    Returns:
        What was left out of the files on purpose, one sentence each.

    Raises:
        AdapterError: a file does not match wholly; no expert is changed then.
    """
    experts: dict[Expert, nn.Module] = {"high": pipeline.transformer}
    if pipeline.transformer_2 is not None:
        experts["low"] = pipeline.transformer_2
    planned = planned_adapters(experts, resolved, roles)
    return tuple(note for expert, network in experts.items() for note in _fused(network, expert, planned))


@dataclass(frozen=True, eq=False)
class PlannedAdapter:
    """A file that matches wholly, and what it changes of each expert."""

    file: str
    strength: float
    changes: Mapping[Expert, AdapterWeights]


def planned_adapters(
    experts: Mapping[Expert, nn.Module], resolved: ResolvedCheckpoint, roles: Collection[str] | None = None
) -> list[PlannedAdapter]:
    """Read the checkpoint's adapters of `roles` (None: all) for the experts, in order; nothing is changed.

    Raises:
        AdapterError: a file does not match wholly.
    """
    return [
        PlannedAdapter(
            path.name, entry.scale, adapters_of_experts(read_adapter_file(path), experts, expert=entry.expert)
        )
        for entry, path in zip(resolved.index.stage_one.adapters, resolved.adapters, strict=True)
        if roles is None or entry.role in roles
    ]


def _fused(network: nn.Module, expert: Expert, planned: list[PlannedAdapter]) -> Iterator[str]:
    """Fuse what is planned for an expert; yield a sentence for all that was left out on purpose."""
    for each in planned:
        if expert in each.changes:
            fuse(network, each.changes[expert], strength=each.strength)
            yield from (f"{each.file}, {expert}-noise expert: {note}" for note in each.changes[expert].notes)


def _empty_experts(folder: Path, classes: Mapping[str, Any]) -> dict[Expert, nn.Module]:
    """Make the experts without their weights."""
    experts: dict[Expert, nn.Module] = {}
    for name, expert in EXPERT_OF.items():
        if name in classes:
            with as_checkpoint_error(folder / name), init_empty_weights():
                experts[expert] = classes[name].from_config(classes[name].load_config(str(folder / name)))
    return experts


def network_classes(folder: Path) -> dict[str, Any]:
    """Return the class of each network of a pipeline; modules of this package that it names are imported."""
    model_index = read_json(folder / "model_index.json")
    if model_index.get("_class_name") != _PIPELINE:
        msg = f"{folder / 'model_index.json'} is of a {model_index.get('_class_name')}; Stage I takes {_PIPELINE}"
        raise CheckpointError(msg)
    named: Mapping[str, Any] = {
        name: value for name, value in model_index.items() if isinstance(value, list) and len(value) == 2 and value[0]
    }
    classes: dict[str, Any] = {}
    for name, (library, class_name) in sorted(named.items()):
        if not (folder / name).is_dir():
            msg = f"{folder / 'model_index.json'} names {name}, and there is no folder {folder / name}; get it again"
            raise CheckpointError(msg)
        if str(library).startswith("swifti2v.") or name not in _WITHOUT_WEIGHTS:
            # Also for the sake of diffusers, which finds classes of other packages only in imported modules.
            with as_checkpoint_error(folder / "model_index.json"):
                found = getattr(import_module(_trusted(library)), class_name)
            if name not in _WITHOUT_WEIGHTS:
                classes[name] = found
    return classes


def _trusted(library: object) -> str:
    """Return the module that a checkpoint names, if it is of a library whose loaders run no code of the checkpoint."""
    if library in {"diffusers", "transformers"} or str(library).startswith("swifti2v."):
        return str(library)
    msg = f"networks of {library!r} are not loaded; use those of diffusers, transformers or this package"
    raise CheckpointError(msg)
