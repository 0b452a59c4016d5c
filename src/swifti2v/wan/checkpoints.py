"""Where weights come from: a name, a folder or a hub repository becomes loaded networks, or one clear error.

Layout of a checkpoint::

    swifti2v.json                     index (`swifti2v.wan.checkpoint_index`)
    stage_one/                        a `WanImageToVideoPipeline` as diffusers saves it
    stage_two/{transformer,vae}/      `StageTwoTransformer` or stock `WanTransformer3DModel`; codec
    adapters/*.safetensors            LoRA files, optional

Each part may instead lie in a hub repository that the index names. Everything is read from safetensors: nothing that
is loaded can run code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import AutoencoderKLWan

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_files import (
    Hub,
    as_checkpoint_error,
    check_weights_loaded,
    read_json,
    stage_one_patterns,
    stage_two_patterns,
    stored_names,
    verify_checksums,
)
from swifti2v.wan.checkpoint_index import (
    INDEX_NAME,
    AdapterEntry,
    CheckpointIndex,
    is_hub_id,
    is_within,
    read_index,
)
from swifti2v.wan.stage_one_weights import apply_adapters, load_stage_one_pipeline
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import nn

    from swifti2v.settings import Refiner

__all__ = [
    "PARTS",
    "STAGE_TWO_CODECS",
    "Part",
    "ResolvedCheckpoint",
    "apply_adapters",
    "load_stage_one_pipeline",
    "load_stage_two_transformer",
    "load_stage_two_vae",
    "preset_names",
    "resolve",
]

Part = Literal["stage_one", "stage_two"]
PARTS: tuple[Part, ...] = get_args(Part)

# Codecs of Stage II besides diffusers': class name in config.json -> module. Imported only when met.
STAGE_TWO_CODECS = {"BlockTransformCodec": "swifti2v.mini.transform_codec"}

_TRANSFORMERS = ("StageTwoTransformer", "WanTransformer3DModel")


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
    stage_one: Path | None = None
    stage_two: Path | None = None
    adapters: tuple[Path, ...] = ()
    first, second = index.stage_one, index.stage_two
    if "stage_one" in parts:
        stage_one = _source_folder(root, first.source, first.revision, hub, _patterns(index, "stage_one", described))
        if "stage_one" not in described:
            adapters = tuple(_adapter_file(root, adapter, hub) for adapter in first.adapters)
    if "stage_two" in parts:
        stage_two = _source_folder(root, second.source, second.revision, hub, _patterns(index, "stage_two", described))
    if verify:
        verify_checksums(root, index.sha256, _patterns_inside(index, parts, described))
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


def _patterns(index: CheckpointIndex, part: Part, described: Collection[Part]) -> list[str]:
    """Patterns, relative to its source, of the files of a part."""
    two, weights = index.stage_two, part not in described
    if part == "stage_one":
        return stage_one_patterns(weights=weights)
    return stage_two_patterns(two.transformer_subfolder, two.vae_subfolder, weights=weights)


def _patterns_inside(index: CheckpointIndex, parts: Collection[Part], described: Collection[Part]) -> list[str]:
    """Patterns, relative to the index, of the files of `parts` that the checkpoint itself holds."""
    patterns: list[str] = []
    for part in parts:
        source = (index.stage_one if part == "stage_one" else index.stage_two).source
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
    name = class_name_in(folder)
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
    name = class_name_in(folder)
    if name == "AutoencoderKLWan":
        return _load_model(AutoencoderKLWan, folder, dtype)
    if name not in STAGE_TWO_CODECS:
        msg = (
            f"{folder / 'config.json'} is of a {name}; Stage II takes AutoencoderKLWan or {', '.join(STAGE_TWO_CODECS)}"
        )
        raise CheckpointError(msg)
    return _load_model(getattr(import_module(STAGE_TWO_CODECS[name]), name), folder, torch.float32)


def _load_model(model_class: Any, folder: Path, dtype: torch.dtype, *, own_table: bool = False) -> Any:
    names = stored_names(folder)
    with as_checkpoint_error(folder):
        model = model_class.from_pretrained(str(folder), dtype=dtype, local_files_only=True, use_safetensors=True)
    check_weights_loaded(model, names, folder, optional=("frame_kind_table",) if own_table else ())
    return model


def class_name_in(folder: Path) -> str:
    """Return the class that a configuration is of."""
    return str(read_json(folder / "config.json").get("_class_name"))
