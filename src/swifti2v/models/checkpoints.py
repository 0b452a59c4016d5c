"""Where weights come from: a name, a folder or a hub repository becomes loaded networks, or one clear error.

Layout of a checkpoint::

    swifti2v.json                     index (`swifti2v.models.checkpoint_index`)
    stage_one/                        a `WanImageToVideoPipeline` as diffusers saves it
    stage_two/{transformer,vae}/      `StageTwoTransformer` or stock `WanTransformer3DModel`; codec
    adapters/*.safetensors            LoRA files, optional

Each part may instead lie in a hub repository that the index names. Everything is read from safetensors: nothing that
is loaded can run code of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import AutoencoderKLWan

from swifti2v.errors import CheckpointError
from swifti2v.models.adapters import AdapterWeights, Expert, adapters_of_experts, fuse, read_adapter_file
from swifti2v.models.checkpoint_files import (
    Hub,
    as_checkpoint_error,
    check_weights_loaded,
    read_json,
    stage_one_patterns,
    stage_two_patterns,
    stored_names,
    verify_checksums,
)
from swifti2v.models.checkpoint_index import (
    INDEX_NAME,
    AdapterEntry,
    CheckpointIndex,
    Refiner,
    is_hub_id,
    is_within,
    read_index,
)
from swifti2v.models.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline
    from torch import nn

Part = Literal["stage_one", "stage_two"]
PARTS: tuple[Part, ...] = get_args(Part)

logger = logging.getLogger(__name__)

# Codecs of Stage II besides diffusers': class name in config.json -> module. Imported only when met.
STAGE_TWO_CODECS = {"BlockTransformCodec": "swifti2v.models.transform_codec"}

_PIPELINE = "WanImageToVideoPipeline"
_TRANSFORMERS = ("StageTwoTransformer", "WanTransformer3DModel")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "image_processor")


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint whose files are on this machine.

    Args:
        index: what `swifti2v.json` says.
        root: folder of `swifti2v.json`.
        stage_one: folder of the pipeline; None if that part was not asked for.
        stage_two: folder that holds transformer and codec; None if that part was not asked for.
        adapters: the files of ``index.stage_one.adapters``, in order; empty without Stage I.
    """

    index: CheckpointIndex
    root: Path
    stage_one: Path | None
    stage_two: Path | None
    adapters: tuple[Path, ...] = ()

    def folder_of(self, part: Part) -> Path:
        """Folder of `part`; raise `CheckpointError` if the checkpoint was resolved without it."""
        folder = self.stage_one if part == "stage_one" else self.stage_two
        if folder is None:
            msg = f"checkpoint {self.index.name} was resolved without {part}; resolve it with parts={PARTS}"
            raise CheckpointError(msg)
        return folder


# --------------------------------------------------------------------------------------------------------- resolving


def preset_names() -> tuple[str, ...]:
    """Names that `resolve` knows by itself, those shipped with the package."""
    return tuple(sorted(path.parent.name for path in _presets().glob(f"*/{INDEX_NAME}")))


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    parts: Collection[Part] = PARTS,
    verify: bool = False,
) -> ResolvedCheckpoint:
    """Find a checkpoint and bring the files of its parts onto this machine.

    Args:
        name_or_path: a preset (`preset_names`), a folder with `swifti2v.json`, or a hub repository ``OWNER/NAME``.
        revision: branch, tag or commit of a hub repository.
        cache_dir: of `huggingface_hub`; None: its own.
        local_files_only: never ask the network.
        parts: the stages wanted; of hub repositories only their files are downloaded.
        verify: check every file of the wanted parts against the index's `sha256`.

    Raises:
        CheckpointError: no such checkpoint, no network, a file missing, a checksum that differs.
    """
    hub = Hub(cache_dir=cache_dir, local_files_only=local_files_only)
    root = _local_root(str(name_or_path))
    if root is None:
        repository = str(name_or_path)
        root = hub.fetch(repository, revision, [INDEX_NAME])
        index = read_index(root / INDEX_NAME)
        _refuse_foreign_folders(index)
        inside = _patterns_inside(index, parts)
        root = hub.fetch(repository, revision, [INDEX_NAME, *inside]) if inside else root
    else:
        if revision is not None:
            msg = f"revision {revision!r} belongs to hub repositories, and {name_or_path} is a folder; leave it out"
            raise CheckpointError(msg)
        index = read_index(root / INDEX_NAME)
    stage_one: Path | None = None
    stage_two: Path | None = None
    adapters: tuple[Path, ...] = ()
    if "stage_one" in parts:
        entry = index.stage_one
        stage_one = _source_folder(root, entry.source, entry.revision, hub, stage_one_patterns())
        adapters = tuple(_adapter_file(root, adapter, hub) for adapter in entry.adapters)
    if "stage_two" in parts:
        second = index.stage_two
        patterns = stage_two_patterns(second.transformer_subfolder, second.vae_subfolder)
        stage_two = _source_folder(root, second.source, second.revision, hub, patterns)
    if verify:
        verify_checksums(root, index.sha256, _patterns_inside(index, parts))
    return ResolvedCheckpoint(index, root, stage_one, stage_two, adapters)


def _presets() -> Path:
    return Path(str(resources.files("swifti2v"))) / "presets"


def _local_root(name: str) -> Path | None:
    """Folder of a preset or of a local checkpoint; None if `name` is to be looked for on the hub."""
    if (_presets() / name / INDEX_NAME).is_file() and "/" not in name:
        return _presets() / name
    path = Path(name)
    if path.name == INDEX_NAME:
        path = path.parent
    if path.is_dir():
        if (path / INDEX_NAME).is_file():
            return path
        hint = "it looks like one model of diffusers: make an index that names it" if _is_diffusers(path) else ""
        msg = f"{path} holds no {INDEX_NAME}; {hint or 'pass the folder of a SwiftI2V checkpoint'}"
        raise CheckpointError(msg)
    if is_hub_id(name) and not path.is_absolute():
        return None
    msg = (
        f"there is no checkpoint {name!r}: pass one of {', '.join(preset_names())}, a folder, or OWNER/NAME on the hub"
    )
    raise CheckpointError(msg)


def _is_diffusers(path: Path) -> bool:
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def _refuse_foreign_folders(index: CheckpointIndex) -> None:
    sources = (index.stage_one.source, index.stage_two.source, *(entry.source for entry in index.stage_one.adapters))
    if absolute := [source for source in sources if not (is_within(source) or is_hub_id(source))]:
        msg = f"the index of a hub repository names the local folder {absolute[0]}; it may name ./FOLDER and OWNER/NAME"
        raise CheckpointError(msg)


def _patterns_inside(index: CheckpointIndex, parts: Collection[Part]) -> list[str]:
    """Patterns, relative to the index, of the files of `parts` that the checkpoint itself holds."""
    patterns: list[str] = []
    first, second = index.stage_one, index.stage_two
    if "stage_one" in parts:
        if is_within(first.source):
            patterns += [f"{first.source[2:]}/{pattern}" for pattern in stage_one_patterns()]
        patterns += [f"{each.source[2:]}/{each.weight_name}" for each in first.adapters if is_within(each.source)]
    if "stage_two" in parts and is_within(second.source):
        inner = stage_two_patterns(second.transformer_subfolder, second.vae_subfolder)
        patterns += [f"{second.source[2:]}/{pattern}" for pattern in inner]
    return patterns


def _source_folder(root: Path, source: str, revision: str | None, hub: Hub, patterns: list[str]) -> Path:
    if is_hub_id(source):
        return hub.fetch(source, revision, patterns)
    folder = root / source
    if not folder.is_dir():
        msg = f"{root / INDEX_NAME} names {source}, and there is no folder {folder}; get the whole checkpoint again"
        raise CheckpointError(msg)
    return folder


def _adapter_file(root: Path, entry: AdapterEntry, hub: Hub) -> Path:
    file = _source_folder(root, entry.source, entry.revision, hub, [entry.weight_name]) / entry.weight_name
    if not file.is_file():
        msg = (
            f"the index names the LoRA {entry.weight_name} in {entry.source}, and it is not there; correct weight_name"
        )
        raise CheckpointError(msg)
    return file


# ----------------------------------------------------------------------------------------------------------- loading


def load_stage_two_transformer(
    resolved: ResolvedCheckpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    refiner: Refiner | None = None,
    read: Callable[[Any, Path, torch.dtype], Any] | None = None,
) -> StageTwoTransformer:
    """Load Stage II's network; stock Wan weights (TI2V-5B) load too, without reference channels.

    Args:
        resolved: with the part "stage_two".
        dtype: of the weights; what diffusers keeps in float32 stays so.
        refiner: "concat" needs reference channels, "training-free" must have none; None: the index's default.
        read: reads a network of a class from a folder (`piecewise_reader.py`); None: as diffusers does.

    Raises:
        CheckpointError: missing or damaged files, another class, a network that cannot be run as `refiner`.
    """
    refiner = refiner or resolved.index.stage_two.refiner
    if refiner == "none":
        msg = f"refiner none of {resolved.index.name} uses no transformer; do not load one"
        raise CheckpointError(msg)
    folder = resolved.folder_of("stage_two") / resolved.index.stage_two.transformer_subfolder
    name = _class_name(folder)
    if name not in _TRANSFORMERS:
        msg = f"{folder / 'config.json'} is of a {name}; Stage II takes {' or '.join(_TRANSFORMERS)}"
        raise CheckpointError(msg)
    read = read or partial(_load_model, own_table=True)
    transformer: StageTwoTransformer = read(StageTwoTransformer, folder, dtype)
    channels = transformer.config.reference_channels
    if (channels > 0) != (refiner == "concat"):
        other = "concat" if channels else "training-free"
        msg = f"{folder} has {channels} reference channels and cannot run as refiner {refiner}; use {other}"
        raise CheckpointError(msg)
    return transformer


def load_stage_two_vae(resolved: ResolvedCheckpoint, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load Stage II's codec: diffusers' `AutoencoderKLWan`, or a class of `STAGE_TWO_CODECS`.

    Args:
        resolved: with the part "stage_two".
        dtype: of a network; the linear transforms of `STAGE_TWO_CODECS` stay in float32, the dtype of their latents.

    Raises:
        CheckpointError: missing or damaged files, an unknown class.
    """
    folder = resolved.folder_of("stage_two") / resolved.index.stage_two.vae_subfolder
    name = _class_name(folder)
    if name == "AutoencoderKLWan":
        return _load_model(AutoencoderKLWan, folder, dtype)
    if name not in STAGE_TWO_CODECS:
        msg = (
            f"{folder / 'config.json'} is of a {name}; Stage II takes AutoencoderKLWan or {', '.join(STAGE_TWO_CODECS)}"
        )
        raise CheckpointError(msg)
    return _load_model(getattr(import_module(STAGE_TWO_CODECS[name]), name), folder, torch.float32)


def load_stage_one_pipeline(
    resolved: ResolvedCheckpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.float32,
    roles: Collection[str] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> WanImageToVideoPipeline:
    """Load Stage I with its adapters fused.

    Args:
        resolved: with the part "stage_one".
        dtype: of transformers and text encoder.
        vae_dtype: of the codec; Wan's own code runs it in float32.
        roles: adapters of these roles are applied; None: all. Without "few_step" it is a many-step model.
        networks: components that are loaded already (`read_stage_one_networks`), the adapters in them.

    Raises:
        CheckpointError: missing or damaged files, another pipeline class, weights that do not belong.
        AdapterError: an adapter that does not match.
    """
    from diffusers import WanImageToVideoPipeline

    folder, given = resolved.folder_of("stage_one"), networks or {}
    stored = {name: stored_names(folder / name) for name in _components_with_weights(folder) if name not in given}
    with as_checkpoint_error(folder):
        pipeline = WanImageToVideoPipeline.from_pretrained(
            str(folder),
            dtype={"default": dtype, "vae": vae_dtype},
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    for name, names in stored.items():
        check_weights_loaded(getattr(pipeline, name), names, folder / name)
    if not given:
        for note in apply_adapters(pipeline, resolved, roles=roles):
            logger.info(note)
    return pipeline


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
    notes: list[str] = []
    for entry, path, adapters in chosen_adapters(experts, resolved, roles=roles):
        for expert, adapter in adapters.items():
            fuse(experts[expert], adapter, strength=entry.scale)
            notes += [f"{path.name}, {expert}-noise expert: {note}" for note in adapter.notes]
    return tuple(notes)


def chosen_adapters(
    experts: Mapping[Expert, nn.Module], resolved: ResolvedCheckpoint, *, roles: Collection[str] | None = None
) -> list[tuple[AdapterEntry, Path, dict[Expert, AdapterWeights]]]:
    """Read the checkpoint's adapters of `roles` (None: all) for the experts, in order; nothing is applied.

    Raises:
        AdapterError: a file does not match wholly.
    """
    return [
        (entry, path, adapters_of_experts(read_adapter_file(path), experts, expert=entry.expert))
        for entry, path in zip(resolved.index.stage_one.adapters, resolved.adapters, strict=True)
        if roles is None or entry.role in roles
    ]


def _components_with_weights(folder: Path) -> list[str]:
    """Components of a pipeline that have weights; modules of this package that it names are imported on the way."""
    model_index = read_json(folder / "model_index.json")
    if model_index.get("_class_name") != _PIPELINE:
        msg = f"{folder / 'model_index.json'} is of a {model_index.get('_class_name')}; Stage I takes {_PIPELINE}"
        raise CheckpointError(msg)
    named: Mapping[str, Any] = {
        name: value for name, value in model_index.items() if isinstance(value, list) and len(value) == 2 and value[0]
    }
    for name, (library, class_name) in named.items():
        if str(library).startswith("swifti2v."):
            # diffusers finds classes of other packages only in modules that are imported already.
            with as_checkpoint_error(folder / "model_index.json"):
                getattr(import_module(library), class_name)
        if not (folder / name).is_dir():
            msg = f"{folder / 'model_index.json'} names {name}, and there is no folder {folder / name}; get it again"
            raise CheckpointError(msg)
    return [name for name in named if name not in _WITHOUT_WEIGHTS]


def _load_model(model_class: Any, folder: Path, dtype: torch.dtype, *, own_table: bool = False) -> Any:
    names = stored_names(folder)
    with as_checkpoint_error(folder):
        model = model_class.from_pretrained(str(folder), dtype=dtype, local_files_only=True, use_safetensors=True)
    check_weights_loaded(model, names, folder, optional=("frame_kind_table",) if own_table else ())
    return model


def _class_name(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("_class_name"))
