"""What there is to know of a model before it is downloaded: its networks, and the settings it recommends."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.memory.networks import WAN22, PipelineNetworks, read_networks
from swifti2v.wan.checkpoint_index import INDEX_NAME, is_hub_id, read_index

if TYPE_CHECKING:
    from swifti2v.settings import GenerationSettings

KNOWN = {"wan2.2": WAN22}
"""Models whose networks are described here, as their parts lie in hub repositories."""
EMBEDDED = ("mini",)


class PlannedModel(NamedTuple):
    """The networks of a model, and the settings that it recommends."""

    networks: PipelineNetworks
    settings: GenerationSettings


def planned_model(model: str) -> PlannedModel:
    """Return what is known of a named model or a checkpoint folder; no weights are opened.

    Raises:
        InvalidInputError: `model` is neither a known name nor a folder.
        CheckpointError: the index or a `config.json` is missing or damaged, or a part lies in a hub repository.
    """
    if model in KNOWN or model in EMBEDDED:
        with as_file(files("swifti2v") / "presets" / model) as folder:
            return _read(folder, KNOWN.get(model))
    if Path(model).is_dir():
        return _read(Path(model))
    names = ", ".join((*KNOWN, *EMBEDDED))
    msg = f"model {model!r} is not known; use {names}, or the path of a checkpoint folder"
    raise InvalidInputError(msg, param="model", value=model)


def _read(folder: Path, networks: PipelineNetworks | None = None) -> PlannedModel:
    index = read_index(folder / INDEX_NAME)
    if networks is None:
        stage_two = _local(folder, index.stage_two.source)
        networks = read_networks(
            _local(folder, index.stage_one.source),
            stage_two / index.stage_two.transformer_subfolder,
            stage_two / index.stage_two.vae_subfolder,
            kind=index.stage_one.kind,
            text_tokens=index.stage_one.max_sequence_length,
            reference_reduction=index.stage_one.reference_reduction,
            max_reference_area=index.stage_one.max_area,
            window_frames=index.stage_one.window_frames,
        )
    return PlannedModel(networks, index.default_settings())


def _local(folder: Path, source: str) -> Path:
    if is_hub_id(source):
        msg = f"{source} is a hub repository, and plan downloads nothing; give a checkpoint whose parts are folders"
        raise CheckpointError(msg)
    return folder / source
