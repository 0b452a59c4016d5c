"""Stage I's network in mini: Wan's call, x0 inside, the image kept."""

from __future__ import annotations

import pytest
import torch

from swifti2v.mini.motion_codec import MOTION_CHANNELS
from swifti2v.mini.motion_transformer import (
    MASK_CHANNELS,
    POSITION_CHANNELS,
    SPACE_CYCLES,
    TIME_CYCLES,
    MotionTransformer,
    _positions,
)

CHANNELS = 12


@pytest.fixture
def network() -> MotionTransformer:
    torch.manual_seed(0)
    return MotionTransformer(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * CHANNELS + MASK_CHANNELS + POSITION_CHANNELS,
        out_channels=CHANNELS + 2 * MOTION_CHANNELS,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 2 * CHANNELS + MASK_CHANNELS, 3, 4, 6), torch.randn(2, 5, 16)


@torch.no_grad()
def test_a_step_to_sigma_zero_lands_on_the_prediction(network: MotionTransformer) -> None:
    joined, text = inputs()
    timestep = torch.tensor([833.333, 625.0])
    velocity = network(joined, timestep, text).sample
    clean = joined[:, :CHANNELS] - (timestep / 1000).view(-1, 1, 1, 1, 1) * velocity
    predicted = network.predict_clean(joined, timestep, text)
    torch.testing.assert_close(clean[:, :, 1:], predicted[:, :, 1:], atol=1e-4, rtol=1e-4)
    image = joined[:, CHANNELS + MASK_CHANNELS :, :1]
    torch.testing.assert_close(clean[:, :, :1], image, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_image_latent_of_frame_zero_is_all_that_is_seen_of_the_image(network: MotionTransformer) -> None:
    joined, text = inputs()
    timestep = torch.full((2,), 500.0)
    before = network.predict_clean(joined, timestep, text)
    padded = joined.clone()
    padded[:, CHANNELS + MASK_CHANNELS :, 1:] = 7.0
    assert torch.equal(network.predict_clean(padded, timestep, text), before)
    padded[:, CHANNELS + MASK_CHANNELS :, :1] += 1.0
    assert not torch.allclose(network.predict_clean(padded, timestep, text), before)


@torch.no_grad()
def test_places_are_told_apart_in_a_uniform_picture(network: MotionTransformer) -> None:
    joined = torch.zeros(1, 2 * CHANNELS + MASK_CHANNELS, 2, 4, 6)
    made = network.predict_clean(joined, torch.tensor([1000.0]), torch.zeros(1, 5, 16))
    assert (made[..., 0, 0] - made[..., -2, -2]).abs().max() > 1e-3


def test_positions_and_their_waves() -> None:
    """x, y and time, then a sine and a cosine of each frequency: the phase of any wave follows from them."""
    positions = _positions(torch.zeros(1, 1, 21, 4, 8))[0]
    assert positions.shape == (POSITION_CHANNELS, 21, 4, 8)
    x, y, time = positions[:3]
    assert x[0, 0].tolist() == pytest.approx([-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875])
    assert y[0, :, 0].tolist() == pytest.approx([-0.375, -0.125, 0.125, 0.375])  # in half widths, as x
    assert time[:, 0, 0].tolist() == pytest.approx([step / 20 for step in range(21)])
    sines, cosines = positions[3::2], positions[4::2]
    assert torch.allclose(sines**2 + cosines**2, torch.ones_like(sines), atol=1e-5)
    for axis, first, cycles in ((x, 0, SPACE_CYCLES), (y, 4, SPACE_CYCLES), (time, 8, TIME_CYCLES)):
        for place, frequency in enumerate(cycles, start=first):
            assert torch.allclose(sines[place], torch.sin(2 * torch.pi * frequency * axis), atol=1e-5)
