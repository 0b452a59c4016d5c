"""The weights of `light`, which ship with the package: safetensors of half precision, the configuration beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import safetensors.torch
from safetensors import SafetensorError

from swifti2v.config import from_mapping
from swifti2v.errors import CheckpointError
from swifti2v.light.network import LightConfig, LightNetwork
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

WEIGHTS_NAME = "weights.safetensors"
CONFIG_NAME = "config.json"


def load_network(device: torch.device, folder: Path | None = None) -> LightNetwork:
    """Return the network of a folder in float32 on `device`, for inference; None: the one that ships.

    Raises:
        CheckpointError: a file of `folder` is missing, damaged or of another network.
    """
    return _shipped(device) if folder is None else _read(folder).to(device)


def save_network(config: LightConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights and configuration in the form that `load_network` reads; raise `OutputError` if that fails."""
    make_folder(folder)
    halves = {name: value.half().contiguous() for name, value in weights.items()}
    write_atomically(folder / CONFIG_NAME, (json.dumps(asdict(config), indent=2) + "\n").encode())
    write_atomically(folder / WEIGHTS_NAME, safetensors.torch.save(halves))


@lru_cache(maxsize=4)
def _shipped(device: torch.device) -> LightNetwork:
    with as_file(files("swifti2v") / "presets" / "light") as folder:
        return _read(folder).to(device)


def _read(folder: Path) -> LightNetwork:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        network = LightNetwork(from_mapping(LightConfig, config))
        weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = f"{folder} holds no weights of `light` that can be read ({reason}); train or copy them again"
        raise CheckpointError(msg) from error
    return network.eval().requires_grad_(requires_grad=False)
