"""What the network is before training, what it sees, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from swifti2v.errors import CheckpointError
from swifti2v.light.inputs import GRID, Preparer, warped
from swifti2v.light.network import LightConfig, LightNetwork, aligned, multiply_adds
from swifti2v.light.weights import CONFIG_NAME, WEIGHTS_NAME, load_network, save_network
from swifti2v.reference.resample import warp
from swifti2v.reference.transport import transport_with_confidence

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def untrained() -> LightNetwork:
    torch.manual_seed(1)
    return LightNetwork().eval()


def test_untrained_it_is_the_transported_reference(
    untrained: LightNetwork, motion: torch.Tensor, image: torch.Tensor
) -> None:
    """Clean motion is not steadied, so what goes in is transport's; the gate starts at its confidence."""
    expected = torch.cat([chunk.frames for chunk in transport_with_confidence([motion[:9]], image)], dim=2)[0]
    preparer = Preparer(image, steady=False)
    state = untrained.initial_state(image[None])
    for index, job in enumerate(preparer.jobs(motion[:9].numpy()), start=1):
        with torch.no_grad():
            # An untrained network takes a twentieth of its own last frame: here that frame is the expected one.
            inputs = preparer(job)
            previous = expected[None, :, index]
            made = untrained(*(part[None] for part in inputs[:3]), previous, state.hidden)
        difference = (made.frame[0] - expected[:, index]).abs()
        assert difference.mean() < 0.004, index
        assert made.hidden.abs().max() == 0


def test_a_step_aligns_what_it_remembers(network: LightNetwork, motion: torch.Tensor, image: torch.Tensor) -> None:
    preparer = Preparer(image)
    inputs = preparer(next(iter(preparer.jobs(motion[:3].numpy()))))
    state = network.initial_state(image[None])
    batch = [part[None] for part in inputs]
    flow = torch.nn.functional.interpolate(batch[3], scale_factor=4.0, mode="bilinear") * GRID
    previous = aligned(state.frame, flow, mode="bicubic")
    with torch.no_grad():
        expected = network(*batch[:3], previous, aligned(state.hidden, batch[3], mode="bilinear"))
        made = network.step(*batch, state)
    assert torch.equal(made.frame, expected.frame)
    assert torch.equal(made.hidden, expected.hidden)


def test_both_ways_to_warp_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=(64, 64))[0]
    flow = torch.rand(2, 64, 64, generator=generator) * 6 - 3
    inside = np.s_[:, 8:-8, 8:-8]
    assert (warped(picture, flow)[inside] - warp(picture, flow)[inside]).abs().mean() < 2e-3


def test_joining_for_inference_is_that_of_training(
    network: LightNetwork, motion: torch.Tensor, image: torch.Tensor
) -> None:
    """Without gradients the inputs are joined by another way, with fewer copies."""
    preparer = Preparer(image)
    inputs = preparer(next(iter(preparer.jobs(motion[:3].numpy()))))
    batch = [part[None] for part in inputs]
    trained = network.step(*batch, network.initial_state(image[None])).frame.detach()
    with torch.no_grad():
        made = network.step(*batch, network.initial_state(image[None])).frame
    assert (made - trained).abs().max() < 1e-5


def test_multiply_adds_are_those_of_the_convolutions(untrained: LightNetwork) -> None:
    counted = 0

    def count(module: torch.nn.Conv2d, _inputs: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += module.weight.numel() * output.shape[-1] * output.shape[-2]

    for module in untrained.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    picture = torch.zeros(1, 3, 32, 48)
    with torch.no_grad():
        untrained.step(
            picture, picture, torch.zeros(1, 19, 8, 12), torch.zeros(1, 2, 8, 12), untrained.initial_state(picture)
        )
    assert counted == multiply_adds(LightConfig()) * 8 * 12


def test_weights_are_read_as_they_were_saved(network: LightNetwork, tmp_path: Path) -> None:
    save_network(network.config, network.state_dict(), tmp_path)
    read = load_network(torch.device("cpu"), tmp_path)
    assert read.config == network.config
    for name, value in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.half().float())
    assert not any(parameter.requires_grad for parameter in read.parameters())


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("content", [None, b"{}", b'{"width": 8}'])
def test_weights_that_cannot_be_read_are_refused(
    network: LightNetwork, tmp_path: Path, name: str, content: bytes | None
) -> None:
    save_network(network.config, network.state_dict(), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_network(torch.device("cpu"), tmp_path)


def test_the_weights_that_ship_are_of_the_default_network() -> None:
    shipped = load_network(torch.device("cpu"))
    assert shipped.config == LightConfig()
    assert sum(parameter.numel() for parameter in shipped.parameters()) == 688_920
    assert all(parameter.isfinite().all() for parameter in shipped.parameters())
