"""What predict_targets shows the network, and how it reads the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.segments import FrameKind, Segment, plan_segments
from swifti2v.wan.condition import predict_targets
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS = 3
# Window 0 | 3 | 4 5 | 6: anchor, one finished, two targets, one unrefined.
SEGMENT = Segment(index=1, targets=range(4, 6), before=range(3, 4), after=range(6, 7))


class RecordingNetwork:
    """Answers every call with the same output and keeps what it was given."""

    def __init__(self, in_channels: int = 2 * CHANNELS, *, residual: bool = False, dtype: Any = torch.float32) -> None:
        self.config = SimpleNamespace(in_channels=in_channels, prediction_type="residual" if residual else "velocity")
        self.dtype = dtype
        self.output = torch.randn(2, CHANNELS, 5, 4, 6)
        self.seen: Any = None

    def __call__(self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> SimpleNamespace:
        self.seen = SimpleNamespace(hidden_states=hidden_states, timestep=timestep, text=encoder_hidden_states, **more)
        return SimpleNamespace(sample=self.output[:, :, more["output_frames"]].to(self.dtype))


def seen_by(network: RecordingNetwork, window: dict[str, Any], **changes: Any) -> Any:
    predict_targets(network, **window | changes)
    return network.seen


@pytest.fixture
def window() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "segment": SEGMENT,
        "slots": noise(2, CHANNELS, 5, 4, 6),
        "reference": noise(2, CHANNELS, 5, 4, 6),
        "targets": noise(2, CHANNELS, 2, 4, 6),
        "sigma": 0.625,
        "prompt_embeds": noise(2, 5, 32),
    }


# ---- what the network sees


def test_context_from_the_slots_targets_from_x_and_the_reference_behind(window: dict[str, Any]) -> None:
    slots_before = window["slots"].clone()
    seen = seen_by(RecordingNetwork(), window).hidden_states
    slots, reference = seen.split(CHANNELS, dim=1)
    assert torch.equal(slots[:, :, 2:4], window["targets"])
    assert torch.equal(slots[:, :, [0, 1, 4]], window["slots"][:, :, [0, 1, 4]])
    assert torch.equal(reference, window["reference"])
    assert torch.equal(window["slots"], slots_before)
    window["slots"][:, :, SEGMENT.target_slice] = torch.nan  # ignored
    assert torch.equal(seen_by(RecordingNetwork(), window).hidden_states, seen)
    narrow = seen_by(RecordingNetwork(CHANNELS), window).hidden_states  # no channels for the reference
    assert torch.equal(narrow, slots)
    without = seen_by(RecordingNetwork(), window, slots=None).hidden_states
    assert torch.equal(without, seen_by(RecordingNetwork(), window, slots=window["reference"]).hidden_states)


def test_a_residual_network_is_not_shown_pure_noise(window: dict[str, Any]) -> None:
    seen = seen_by(RecordingNetwork(residual=True), window, sigma=torch.tensor([1.0, 0.25]))
    shown = seen.hidden_states[:, :CHANNELS, 2:4]
    assert shown[0].abs().max() == 0
    torch.testing.assert_close(shown[1], 0.75 * window["targets"][1])


def test_noise_level_on_targets_only(window: dict[str, Any]) -> None:
    assert seen_by(RecordingNetwork(), window).timestep.tolist() == [[0, 0, 625, 625, 0]] * 2
    seen = seen_by(RecordingNetwork(), window, sigma=torch.tensor([1.0, 0.5]))
    assert seen.timestep.tolist() == [[0, 0, 1000, 1000, 0], [0, 0, 500, 500, 0]]


@pytest.mark.parametrize("sigma", [0.9375, torch.tensor(0.9375), torch.tensor([0.9375], dtype=torch.float64)])
def test_timesteps_stay_float32(window: dict[str, Any], sigma: Any) -> None:
    """bfloat16 has no 937.5."""
    seen = seen_by(RecordingNetwork(dtype=torch.bfloat16), window, sigma=sigma)
    assert seen.timestep[:, 2].tolist() == [937.5, 937.5]
    assert seen.hidden_states.dtype == seen.text.dtype == torch.bfloat16


def test_positions_and_kinds(window: dict[str, Any]) -> None:
    seen = seen_by(RecordingNetwork(), window)
    assert seen.frame_positions.tolist() == [0, 3, 4, 5, 6]
    kinds = [FrameKind.ANCHOR, FrameKind.FINISHED, FrameKind.TARGET, FrameKind.TARGET, FrameKind.UNREFINED]
    assert [FrameKind(value) for value in seen.frame_kinds.tolist()] == kinds
    assert seen_by(RecordingNetwork(), window, position_mode="compact").frame_positions.tolist() == [0, 1, 2, 3, 4]


def test_a_window_without_anchor(window: dict[str, Any]) -> None:
    """Frames 2 3 | 4 5 | 6: the targets stand in the same places, but place 0 is a finished frame."""
    segment = Segment(index=1, targets=range(4, 6), before=range(2, 4), after=range(6, 7), anchor=False)
    seen = seen_by(RecordingNetwork(), window, segment=segment)
    assert seen.timestep.tolist() == [[0, 0, 625, 625, 0]] * 2
    assert seen.frame_positions.tolist() == [2, 3, 4, 5, 6]
    assert seen.frame_kinds.tolist() == [2, 2, 0, 0, 3]
    assert torch.equal(seen.hidden_states[:, :CHANNELS, 2:4], window["targets"])
    assert torch.equal(seen.hidden_states[:, :CHANNELS, :2], window["slots"][:, :, :2])


# ---- the prediction


@pytest.mark.parametrize("sigma", [0.0, 0.625, 1, torch.tensor([0.25, 1.0])])
def test_exact_velocity_gives_the_clean_targets(window: dict[str, Any], sigma: Any) -> None:
    clean, noise = torch.randn(2, 2, CHANNELS, 2, 4, 6)
    level = torch.as_tensor(sigma, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    network = RecordingNetwork()
    network.output[:, :, SEGMENT.target_slice] = noise - clean
    window |= {"sigma": sigma, "targets": (1 - level) * clean + level * noise}
    torch.testing.assert_close(predict_targets(network, **window), clean)


def test_residual_is_added_to_the_reference(window: dict[str, Any]) -> None:
    network = RecordingNetwork(residual=True)
    clean = torch.randn(2, CHANNELS, 2, 4, 6)
    network.output[:, :, SEGMENT.target_slice] = clean - window["reference"][:, :, SEGMENT.target_slice]
    torch.testing.assert_close(predict_targets(network, **window), clean)


@pytest.mark.parametrize("residual", [False, True])
def test_float32_whatever_the_network(window: dict[str, Any], residual: bool) -> None:
    network = RecordingNetwork(residual=residual, dtype=torch.bfloat16)
    network.output.zero_()
    prediction = predict_targets(network, **window)
    assert prediction.dtype == torch.float32
    assert torch.equal(prediction, window["reference"][:, :, 2:4] if residual else window["targets"])


# ---- with the real network


@pytest.fixture
def make(tiny_wan_dit: Callable[..., Any]) -> Callable[..., StageTwoTransformer]:
    def make(**options: Any) -> StageTwoTransformer:
        transformer = StageTwoTransformer.from_wan(tiny_wan_dit(CHANNELS, CHANNELS), **options)
        torch.nn.init.normal_(transformer.frame_kind_table)
        torch.nn.init.normal_(transformer.patch_embedding.weight, std=0.1)
        return transformer

    return make


@pytest.mark.parametrize("prediction_type", ["velocity", "residual"])
@pytest.mark.parametrize("reference_channels", [0, CHANNELS])
@torch.no_grad()
def test_every_part_of_the_window_counts(
    make: Any, window: dict[str, Any], prediction_type: str, reference_channels: int
) -> None:
    transformer = make(reference_channels=reference_channels, prediction_type=prediction_type)
    prediction = predict_targets(transformer, **window)
    assert prediction.shape == (2, CHANNELS, 2, 4, 6)
    assert prediction.isfinite().all()
    rolled = ["slots", "targets", "prompt_embeds", *(["reference"] if reference_channels else [])]
    changes = {"sigma": 0.5, "position_mode": "compact"} | {name: window[name].roll(1, dims=0) for name in rolled}
    for name, value in changes.items():
        other = predict_targets(transformer, **window | {name: value})
        assert (other - prediction).abs().max() > 1e-5, name


@torch.no_grad()
def test_training_free_velocity_is_diffusers_own_step(tiny_wan_dit: Callable[..., Any], window: dict[str, Any]) -> None:
    """One segment that covers the clip, positions 0..F-1: diffusers' class on tokens is the oracle."""
    base = tiny_wan_dit(CHANNELS, CHANNELS)
    (segment,) = plan_segments(5, segment_size=4)
    x = window["slots"]
    timestep = torch.tensor([0.0, 800, 800, 800, 800]).repeat_interleave(6).expand(2, -1)
    velocity = base(x, timestep, window["prompt_embeds"]).sample
    window |= {"segment": segment, "sigma": 0.8, "targets": x[:, :, 1:]}
    prediction = predict_targets(StageTwoTransformer.from_wan(base), **window)
    torch.testing.assert_close(prediction, (x - 0.8 * velocity)[:, :, 1:], rtol=0, atol=1e-5)


def test_a_level_for_each_sample_and_gradients(make: Any, window: dict[str, Any]) -> None:
    transformer = make(reference_channels=CHANNELS)
    together = predict_targets(transformer, **window | {"sigma": torch.tensor([0.25, 1.0])})
    for index, sigma in enumerate((0.25, 1.0)):
        alone = predict_targets(transformer, **window | {"sigma": sigma})
        torch.testing.assert_close(together[index], alone[index], rtol=0, atol=1e-5)
    together.square().mean().backward()
    assert (transformer.patch_embedding.weight.grad.abs().sum(dim=(0, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": torch.zeros(2, CHANNELS, 3, 4, 6)},
        {"targets": torch.zeros(2, CHANNELS, 4, 6)},
        {"slots": torch.zeros(2, CHANNELS, 4, 4, 6)},
        {"reference": torch.zeros(2, CHANNELS, 5, 4, 8)},
        {"reference": torch.zeros(1, CHANNELS, 5, 4, 6)},
        {"prompt_embeds": torch.zeros(1, 5, 32)},
        {"sigma": torch.zeros(3)},
        {"sigma": 625.0},
    ],
)
def test_shapes_and_level_are_checked(window: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"^{next(iter(changes))} is"):
        predict_targets(RecordingNetwork(), **window | changes)


def test_channels_of_another_codec_are_refused(window: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="takes 96 channels"):
        predict_targets(RecordingNetwork(96), **window)
