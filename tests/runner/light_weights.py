"""A file of weights in the layout of TAEHV's, for the 48 channels of the tiny checkpoint's codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from swifti2v.wan.taehv import LightDecoderNetwork, LightLayout

if TYPE_CHECKING:
    from pathlib import Path


def write_light_weights(path: Path, *, num_channels: int = 48, patch_size: int = 2) -> Path:
    """Write random weights and return the path."""
    torch.manual_seed(0)
    network = LightDecoderNetwork(LightLayout(num_channels, (8, 8, 4, 4), patch_size=patch_size))
    save_file(network.state_dict(), path)
    return path
