"""A photograph under a panning camera, and its reductions, at a size that is refined in a second."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.light.network import LightConfig, LightNetwork

EXAMPLE = next((Path(__file__).parents[2] / "examples").glob("*.jpg"))
HEIGHT, WIDTH = 96, 160


@pytest.fixture(scope="session")
def truth() -> np.ndarray:
    """Uint8 [29, 96, 160, 3]."""
    picture = PIL.Image.open(EXAMPLE).convert("RGB").resize((256, 144), PIL.Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return np.stack([pixels[24 : 24 + HEIGHT, 8 + 2 * t : 8 + 2 * t + WIDTH] for t in range(29)])


@pytest.fixture(scope="session")
def image(truth: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(truth[0]).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="session")
def motion(truth: np.ndarray) -> torch.Tensor:
    """Uint8 [29, 24, 40, 3]."""
    return torch.from_numpy(np.stack([cv2.resize(frame, (40, 24), interpolation=cv2.INTER_AREA) for frame in truth]))


@pytest.fixture(scope="session")
def network() -> LightNetwork:
    """Random weights that change what they are given, at another size than the one that ships."""
    torch.manual_seed(0)
    network = LightNetwork(LightConfig(width=8, deep_width=16, deep_blocks=1, hidden=4, join_width=8))
    with torch.no_grad():
        for parameter in network.leave.parameters():
            parameter.normal_(0, 0.05)
    return network.eval()
