"""The network of motion: forms of its latents, gates, sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from swifti2v.mini.motion_examples import path_of
from swifti2v.mini.network import (
    FEATURES,
    GLOBALS,
    TOKEN_CHANNELS,
    MotionLatents,
    MotionNetwork,
    grid_of,
    picture_features,
    sample,
    to_latents,
    to_path,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def network() -> MotionNetwork:
    torch.manual_seed(0)
    return MotionNetwork(width=32, num_layers=1, num_heads=2, text_width=8).eval()


def picture(width: int = 80, height: int = 44) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_latents_hold_a_path_exactly() -> None:
    path = path_of([("zoom in", 1.0), ("ripple", 1.8)], rows=22, columns=40, aspect=0.55, horizon=0.05)
    rates, places = to_latents(path)
    again = to_path(MotionLatents(torch.from_numpy(rates)[None], torch.from_numpy(places)[None]), 22, 40)
    np.testing.assert_allclose(again.maps, path.maps, atol=1e-7)
    np.testing.assert_allclose(again.camera, path.camera, atol=1e-6)
    assert again.cycles[1] == pytest.approx(5.4, rel=1e-5)


@pytest.mark.parametrize(("width", "height"), [(320, 176), (640, 352), (176, 320), (256, 256)])
def test_the_grid_depends_on_the_aspect_only(width: int, height: int) -> None:
    rows, columns = grid_of(width, height)
    assert rows % 2 == columns % 2 == 0
    assert 700 < rows * columns < 1100
    assert picture_features(picture(width, height)).shape == (rows * columns // 4, FEATURES)


def test_padding_of_a_prompt_counts_for_nothing(network: MotionNetwork) -> None:
    features = torch.from_numpy(picture_features(picture()))[None]
    noisy = MotionLatents(torch.randn(1, GLOBALS), torch.randn(1, features.shape[1], TOKEN_CHANNELS))
    text = torch.randn(1, 3, 8)
    padded = torch.cat([text, torch.zeros(1, 5, 8)], dim=1)
    for short, long in zip(
        network(noisy, torch.ones(1), features, text), network(noisy, torch.ones(1), features, padded), strict=True
    ):
        torch.testing.assert_close(short, long)


def test_samples_repeat_with_the_seed_and_survive_saving(network: MotionNetwork, tmp_path: Path) -> None:
    features = torch.from_numpy(picture_features(picture()))
    text = torch.randn(1, 3, 8)

    def drawn(of: MotionNetwork, seed: int) -> MotionLatents:
        return sample(of, features, text, num_steps=3, generator=torch.Generator().manual_seed(seed))

    network.save_pretrained(tmp_path)
    again = MotionNetwork.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(drawn(network, 1).places, drawn(again, 1).places)
    assert not torch.equal(drawn(network, 1).places, drawn(network, 2).places)
