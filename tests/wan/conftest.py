"""Networks and checkpoints that several tests of models take: real classes at random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.wan.transformer import StageTwoTransformer
from tests.wan.stage_two_inputs import CHANNELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKLWan, WanTransformer3DModel


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture(params=["tiny_vae21", "tiny_vae22"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """Both generations of the codec; the second with statistics that are not those of a standard normal."""
    model = request.getfixturevalue(request.param)
    if request.param == "tiny_vae22":
        model.register_to_config(
            latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(), latents_std=torch.linspace(0.5, 2.0, 48).tolist()
        )
    return model


@pytest.fixture
def expert(tiny_wan_dit: Callable[..., Any]) -> WanTransformer3DModel:
    """An expert of Stage I."""
    return tiny_wan_dit(36, 16)


@pytest.fixture
def base(tiny_wan_dit: Callable[..., Any]) -> WanTransformer3DModel:
    """Diffusers' own transformer, which Stage II's derives from."""
    return tiny_wan_dit(CHANNELS, CHANNELS)


@pytest.fixture
def transformer(tiny_wan_dit: Callable[..., Any]) -> StageTwoTransformer:
    """Same weights as `base`, in our class."""
    return StageTwoTransformer.from_wan(tiny_wan_dit(CHANNELS, CHANNELS))
