"""The weights of `light`, which ship with the package: safetensors of half precision, the configuration beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from swifti2v.light.network import LightConfig, LightNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

WEIGHTS_NAME = "weights.safetensors"
CONFIG_NAME = "config.json"


def load_network(device: torch.device, folder: Path | None = None) -> LightNetwork:
    """Return the network of a folder in float32 on `device`, for inference; None: the one that ships."""
    return _shipped(device) if folder is None else _read(folder).to(device)


def save_network(config: LightConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights and configuration in the form that `load_network` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in weights.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


@lru_cache(maxsize=4)
def _shipped(device: torch.device) -> LightNetwork:
    with as_file(files("swifti2v") / "presets" / "light") as folder:
        return _read(folder).to(device)


def _read(folder: Path) -> LightNetwork:
    network = LightNetwork(LightConfig(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))))
    network.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_NAME).items()})
    return network.eval().requires_grad_(requires_grad=False)
