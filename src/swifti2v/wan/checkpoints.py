"""Where weights come from: a name, a folder or a hub repository becomes loaded networks, or one clear error.

Layout of a checkpoint::

    swifti2v.json                     index (`swifti2v.wan.checkpoint_index`)
    stage_one/                        a `WanImageToVideoPipeline` as diffusers saves it, or a `PathStageOne`
    stage_two/{transformer,vae}/      `StageTwoTransformer` or stock `WanTransformer3DModel`; codec
    adapters/*.safetensors            LoRA files, optional

Each part may instead lie in a hub repository that the index names. `resolve` brings the files onto this machine; the
functions after it load them, one network at a time (`network_reader.py`). Everything is read from safetensors: nothing
that is loaded can run code of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import WanImageToVideoPipeline

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_files import Hub, as_checkpoint_error, read_json, verify_checksums
from swifti2v.wan.checkpoint_index import (
    INDEX_NAME,
    AdapterEntry,
    CheckpointIndex,
    StageOneEntry,
    StageTwoEntry,
    is_hub_id,
    is_within,
    read_index,
)
from swifti2v.wan.lora import AdapterWeights, adapters_of_experts, read_adapter_file
from swifti2v.wan.network_reader import NetworkReader, described_network
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from torch import nn

    from swifti2v.settings import Refiner
    from swifti2v.wan.lora_keys import Expert

LOGGER = logging.getLogger(__name__)

Part = Literal["stage_one", "stage_two"]
PARTS: tuple[Part, ...] = get_args(Part)

_PIPELINE = "WanImageToVideoPipeline"
_STAGE_ONE_NETWORKS = ("transformer", "transformer_2", "text_encoder", "vae", "image_encoder")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "image_processor")
_EXPERT_OF: dict[str, Expert] = {"transformer": "high", "transformer_2": "low"}
_STORED_NARROW = (*_EXPERT_OF, "text_encoder")  # the codec is a quarter of a GiB
_TRANSFORMERS = ("StageTwoTransformer", "WanTransformer3DModel")
_PATH_NETWORKS = ("network", "text_encoder")
# Stages I that are no pipeline of diffusers: kind in the index -> module and class. Imported only when met.
_STAGES_ONE = {"path": ("swifti2v.mini.stage_one", "PathStageOne")}
# Codecs of Stage II: class name in config.json -> module. Imported only when met.
_CODECS = {"AutoencoderKLWan": "diffusers", "BlockTransformCodec": "swifti2v.mini.transform_codec"}

Settle = Callable[[str, "nn.Module"], object]
"""``(name in the pipeline, network)``: called with each network once it is as it will be run."""


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
    described: Collection[Part] = (),
    verify: bool = False,
) -> ResolvedCheckpoint:
    """Find a checkpoint and bring the files of its parts onto this machine.

    Args:
        name_or_path: a preset (`preset_names`), a folder with `swifti2v.json`, or a hub repository ``OWNER/NAME``.
        revision: branch, tag or commit of a hub repository.
        cache_dir: of `huggingface_hub`; None: its own.
        local_files_only: never ask the network.
        parts: the stages wanted; of hub repositories only their files are downloaded.
        described: of these, the stages whose configurations are enough: no weights and no adapters.
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
        inside = _patterns_inside(index, parts, described)
        root = hub.fetch(repository, revision, [INDEX_NAME, *inside]) if inside else root
    else:
        if revision is not None:
            msg = f"revision {revision!r} belongs to hub repositories, and {name_or_path} is a folder; leave it out"
            raise CheckpointError(msg)
        index = read_index(root / INDEX_NAME)
    folders: dict[Part, Path] = {}
    adapters: tuple[Path, ...] = ()
    for part in parts:
        entry = _entry_of(index, part)
        folders[part] = _source_folder(root, entry.source, entry.revision, hub, _patterns(index, part, described))
        if isinstance(entry, StageOneEntry) and part not in described:
            adapters = tuple(_adapter_file(root, adapter, hub) for adapter in entry.adapters)
    if verify:
        verify_checksums(root, index.sha256, _patterns_inside(index, parts, described))
    return ResolvedCheckpoint(index, root, folders.get("stage_one"), folders.get("stage_two"), adapters)


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


def _entry_of(index: CheckpointIndex, part: Part) -> StageOneEntry | StageTwoEntry:
    return index.stage_one if part == "stage_one" else index.stage_two


def _patterns(index: CheckpointIndex, part: Part, described: Collection[Part]) -> list[str]:
    """Return patterns, relative to its source, of the files that loading (or describing) a part needs."""
    suffixes = ("json",) if part in described else ("json", "safetensors")
    if part == "stage_two":  # the text encoder is Stage I's
        networks: tuple[str, ...] = (index.stage_two.transformer_subfolder, index.stage_two.vae_subfolder)
        others: list[str] = []
    elif index.stage_one.kind == "path":  # so few weights that they are loaded even where configurations are enough
        networks, others, suffixes = _PATH_NETWORKS, ["settings.json", "tokenizer/*"], ("json", "safetensors")
    else:
        networks = _STAGE_ONE_NETWORKS
        others = ["model_index.json", "scheduler/*.json", "tokenizer/*", "image_processor/*.json"]
    return [*others, *(f"{name}/*.{suffix}" for name in networks for suffix in suffixes)]


def _patterns_inside(index: CheckpointIndex, parts: Collection[Part], described: Collection[Part]) -> list[str]:
    """Return patterns, relative to the index, of the files of `parts` that the checkpoint itself holds."""
    patterns: list[str] = []
    for part in parts:
        source = _entry_of(index, part).source
        if is_within(source):
            patterns += [f"{source[2:]}/{pattern}" for pattern in _patterns(index, part, described)]
    if "stage_one" in parts and "stage_one" not in described:
        adapters = index.stage_one.adapters
        patterns += [f"{each.source[2:]}/{each.weight_name}" for each in adapters if is_within(each.source)]
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


# -------------------------------------------------------------------------------------------------------- Stage I


def load_other_stage_one(resolved: ResolvedCheckpoint) -> Any:
    """Load a Stage I that is no pipeline of diffusers, of the class that the index's `kind` stands for.

    Raises:
        CheckpointError: missing or damaged files.
    """
    module, name = _STAGES_ONE[resolved.index.stage_one.kind]
    folder = resolved.folder_of("stage_one")
    with as_checkpoint_error(folder):
        return getattr(import_module(module), name).from_pretrained(folder)


def load_stage_one_pipeline(
    resolved: ResolvedCheckpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.float32,
    roles: Collection[str] | None = None,
    reader: NetworkReader | None = None,
    settle: Settle | None = None,
) -> WanImageToVideoPipeline:
    """Load Stage I with its adapters fused, network by network.

    Args:
        resolved: with the part "stage_one".
        dtype: of transformers and text encoder.
        vae_dtype: of the codec; Wan's own code runs it in float32.
        roles: adapters of these roles are applied; None: all. Without "few_step" it is a many-step model.
        reader: how transformers and text encoder are stored; None: as `dtype`.
        settle: moves a network before the next one is read.

    Raises:
        CheckpointError: missing or damaged files, another pipeline class, weights that do not belong.
        AdapterError: an adapter that does not match; nothing has been read then.
    """
    folder = _pipeline_folder(resolved)
    plain = NetworkReader()
    readers = {name: (reader or plain) if name in _STORED_NARROW else plain for name in _STAGE_ONE_NETWORKS}
    classes = _network_classes(folder)
    networks = {
        name: readers[name].build(classes[name], folder / name, vae_dtype if name == "vae" else dtype)
        for name in _STAGE_ONE_NETWORKS  # the largest first, while the rest of the host is free
        if name in classes
    }
    adapters = _adapters_of(networks, resolved, roles)
    for name, network in networks.items():
        readers[name].fill(network, folder / name, adapters.get(name, []))
        if settle is not None:
            settle(name, network)
    with as_checkpoint_error(folder):
        return WanImageToVideoPipeline.from_pretrained(str(folder), local_files_only=True, **networks)


def described_stage_one(resolved: ResolvedCheckpoint, *, dtype: torch.dtype) -> WanImageToVideoPipeline:
    """Return Stage I's pipeline with its tokenizer and scheduler, and networks of `dtype` without weights.

    Who runs only Stage II asks Stage I for its geometry, its dimensions and its checks, and never for its numbers.

    Raises:
        CheckpointError: missing or damaged files.
    """
    folder = _pipeline_folder(resolved)
    networks = {name: described_network(kind, folder / name, dtype) for name, kind in _network_classes(folder).items()}
    with as_checkpoint_error(folder):
        return WanImageToVideoPipeline.from_pretrained(str(folder), local_files_only=True, **networks)


def _pipeline_folder(resolved: ResolvedCheckpoint) -> Path:
    """Return the folder of Stage I; raise `CheckpointError` if it is no pipeline of diffusers."""
    if resolved.index.stage_one.kind != "wan":
        msg = f"Stage I of {resolved.index.name} is of kind {resolved.index.stage_one.kind}; this needs a {_PIPELINE}"
        raise CheckpointError(msg, param="kind", value=resolved.index.stage_one.kind)
    return resolved.folder_of("stage_one")


def _adapters_of(
    networks: Mapping[str, nn.Module], resolved: ResolvedCheckpoint, roles: Collection[str] | None
) -> dict[str, list[tuple[AdapterWeights, float]]]:
    """Return the checkpoint's adapters of `roles` (None: all) with their strengths, in order, by network."""
    experts = {expert: networks[name] for name, expert in _EXPERT_OF.items() if name in networks}
    found: dict[str, list[tuple[AdapterWeights, float]]] = {name: [] for name in _EXPERT_OF}
    for entry, path in zip(resolved.index.stage_one.adapters, resolved.adapters, strict=True):
        if roles is not None and entry.role not in roles:
            continue
        adapters = adapters_of_experts(read_adapter_file(path), experts, expert=entry.expert)
        for name, expert in _EXPERT_OF.items():
            if expert in adapters:
                found[name].append((adapters[expert], entry.scale))
                for note in adapters[expert].notes:
                    LOGGER.info("%s, %s-noise expert: %s", path.name, expert, note)
    return found


def _network_classes(folder: Path) -> dict[str, Any]:
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
            # diffusers finds classes of other packages only in modules that have been imported.
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


# ------------------------------------------------------------------------------------------------------- Stage II


def load_stage_two_transformer(
    resolved: ResolvedCheckpoint,
    *,
    dtype: torch.dtype = torch.bfloat16,
    refiner: Refiner | None = None,
    reader: NetworkReader | None = None,
) -> StageTwoTransformer:
    """Load Stage II's network; stock Wan weights (TI2V-5B) load too, without reference channels.

    Args:
        resolved: with the part "stage_two".
        dtype: of the weights; what diffusers keeps in float32 stays so.
        refiner: "concat" needs reference channels, "training-free" must have none; None: the index's default.
        reader: how the weights are stored; None: as `dtype`.

    Raises:
        CheckpointError: missing or damaged files, another class, a network that cannot be run as `refiner`.
    """
    refiner = refiner or resolved.index.stage_two.refiner
    if refiner in {"light", "none"}:
        msg = f"refiner {refiner} of {resolved.index.name} uses no transformer; do not load one"
        raise CheckpointError(msg)
    folder = resolved.folder_of("stage_two") / resolved.index.stage_two.transformer_subfolder
    name = _class_name_in(folder)
    if name not in _TRANSFORMERS:
        msg = f"{folder / 'config.json'} is of a {name}; Stage II takes {' or '.join(_TRANSFORMERS)}"
        raise CheckpointError(msg)
    transformer: StageTwoTransformer = (reader or NetworkReader()).read(StageTwoTransformer, folder, dtype)
    channels = transformer.config.reference_channels
    if (channels > 0) != (refiner == "concat"):
        other = "concat" if channels else "training-free"
        msg = f"{folder} has {channels} reference channels and cannot run as refiner {refiner}; use {other}"
        raise CheckpointError(msg)
    return transformer


def load_stage_two_vae(resolved: ResolvedCheckpoint, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load Stage II's codec: diffusers' `AutoencoderKLWan`, or `BlockTransformCodec`.

    Args:
        resolved: with the part "stage_two".
        dtype: of a Wan codec; the linear transforms of `BlockTransformCodec` stay in float32, the dtype of its latents.

    Raises:
        CheckpointError: missing or damaged files, an unknown class.
    """
    codec_class, folder = _stage_two_codec(resolved)
    network: nn.Module = NetworkReader().read(
        codec_class, folder, dtype if codec_class.__name__ == "AutoencoderKLWan" else torch.float32
    )
    return network


def described_stage_two(resolved: ResolvedCheckpoint, *, dtype: torch.dtype) -> tuple[StageTwoTransformer, nn.Module]:
    """Return Stage II's transformer and codec, of `dtype` and without weights.

    Raises:
        CheckpointError: missing or damaged files, an unknown class of codec.
    """
    folder = resolved.folder_of("stage_two") / resolved.index.stage_two.transformer_subfolder
    transformer: StageTwoTransformer = described_network(StageTwoTransformer, folder, dtype)
    return transformer, described_network(*_stage_two_codec(resolved), dtype)


def _stage_two_codec(resolved: ResolvedCheckpoint) -> tuple[Any, Path]:
    """Return the class of Stage II's codec and its folder."""
    folder = resolved.folder_of("stage_two") / resolved.index.stage_two.vae_subfolder
    name = _class_name_in(folder)
    if name not in _CODECS:
        msg = f"{folder / 'config.json'} is of a {name}; Stage II takes {' or '.join(_CODECS)}"
        raise CheckpointError(msg)
    return getattr(import_module(_CODECS[name]), name), folder


def _class_name_in(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("_class_name"))
