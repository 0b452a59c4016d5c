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

    def __init__(
        self, in_channels: int, *, prediction_type: str = "velocity", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = SimpleNamespace(in_channels=in_channels, prediction_type=prediction_type)
        self.dtype = dtype
        self.output = torch.randn(2, CHANNELS, 5, 4, 6)
        self.seen: dict[str, torch.Tensor] = {}

    def __call__(self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> SimpleNamespace:
        self.seen = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            **more,
        }
        return SimpleNamespace(sample=self.output[:, :, more["output_frames"]].to(self.dtype))


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


class TestWhatTheNetworkSees:
    def test_context_from_the_slots_and_targets_from_x(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS)
        slots_before = window["slots"].clone()
        predict_targets(network, **window)
        slots, reference = network.seen["hidden_states"].split(CHANNELS, dim=1)
        assert torch.equal(slots[:, :, 2:4], window["targets"])
        assert torch.equal(slots[:, :, [0, 1, 4]], window["slots"][:, :, [0, 1, 4]])
        assert torch.equal(reference, window["reference"])
        assert torch.equal(window["slots"], slots_before)

    def test_the_reference_is_the_context_where_no_other_is_given(self, window: dict[str, Any]) -> None:
        seen = []
        for slots in (None, window["reference"].clone()):
            network = RecordingNetwork(2 * CHANNELS)
            predict_targets(network, **window | {"slots": slots})
            seen.append(network.seen["hidden_states"])
        assert torch.equal(*seen)

    def test_a_residual_network_is_not_shown_pure_noise(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS, prediction_type="residual")
        predict_targets(network, **window | {"sigma": torch.tensor([1.0, 0.25])})
        shown = network.seen["hidden_states"][:, :CHANNELS, 2:4]
        assert shown[0].abs().max() == 0
        torch.testing.assert_close(shown[1], 0.75 * window["targets"][1])

    def test_slots_in_the_places_of_targets_are_ignored(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS)
        predict_targets(network, **window)
        seen = network.seen["hidden_states"]
        window["slots"][:, :, SEGMENT.target_slice] = torch.nan
        predict_targets(network, **window)
        assert torch.equal(network.seen["hidden_states"], seen)

    def test_no_reference_channels_where_the_network_has_none(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(CHANNELS)
        predict_targets(network, **window)
        assert network.seen["hidden_states"].shape == (2, CHANNELS, 5, 4, 6)
        assert torch.equal(network.seen["hidden_states"][:, :, 2:4], window["targets"])

    def test_noise_level_on_targets_only(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS)
        predict_targets(network, **window)
        assert network.seen["timestep"].tolist() == [[0, 0, 625, 625, 0]] * 2
        predict_targets(network, **window | {"sigma": torch.tensor([1.0, 0.5])})
        assert network.seen["timestep"].tolist() == [[0, 0, 1000, 1000, 0], [0, 0, 500, 500, 0]]

    @pytest.mark.parametrize("sigma", [0.9375, torch.tensor(0.9375), torch.tensor([0.9375], dtype=torch.float64)])
    def test_timesteps_stay_float32(self, window: dict[str, Any], sigma: Any) -> None:
        """bfloat16 has no 937.5."""
        network = RecordingNetwork(2 * CHANNELS, dtype=torch.bfloat16)
        predict_targets(network, **window | {"sigma": sigma})
        assert network.seen["timestep"][:, 2].tolist() == [937.5, 937.5]
        assert network.seen["hidden_states"].dtype == network.seen["encoder_hidden_states"].dtype == torch.bfloat16

    def test_positions_and_kinds(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS)
        predict_targets(network, **window)
        assert network.seen["frame_positions"].tolist() == [0, 3, 4, 5, 6]
        kinds = [FrameKind(value) for value in network.seen["frame_kinds"].tolist()]
        assert kinds == [
            FrameKind.ANCHOR,
            FrameKind.FINISHED,
            FrameKind.TARGET,
            FrameKind.TARGET,
            FrameKind.UNREFINED,
        ]
        predict_targets(network, **window, position_mode="compact")
        assert network.seen["frame_positions"].tolist() == [0, 1, 2, 3, 4]

    def test_a_window_without_anchor(self, window: dict[str, Any]) -> None:
        """Frames 2 3 | 4 5 | 6: the targets stand in the same places, but place 0 is a finished frame."""
        segment = Segment(index=1, targets=range(4, 6), before=range(2, 4), after=range(6, 7), anchor=False)
        network = RecordingNetwork(2 * CHANNELS)
        predict_targets(network, **window | {"segment": segment})
        assert network.seen["timestep"].tolist() == [[0, 0, 625, 625, 0]] * 2
        assert network.seen["frame_positions"].tolist() == [2, 3, 4, 5, 6]
        assert network.seen["frame_kinds"].tolist() == [2, 2, 0, 0, 3]
        assert torch.equal(network.seen["hidden_states"][:, :CHANNELS, 2:4], window["targets"])
        assert torch.equal(network.seen["hidden_states"][:, :CHANNELS, :2], window["slots"][:, :, :2])


class TestPrediction:
    @pytest.mark.parametrize("sigma", [0.0, 0.625, 1, torch.tensor([0.25, 1.0])])
    def test_exact_velocity_gives_the_clean_targets(self, window: dict[str, Any], sigma: Any) -> None:
        clean, noise = torch.randn(2, CHANNELS, 2, 4, 6), torch.randn(2, CHANNELS, 2, 4, 6)
        level = torch.as_tensor(sigma, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        network = RecordingNetwork(2 * CHANNELS)
        network.output[:, :, SEGMENT.target_slice] = noise - clean
        window |= {"sigma": sigma, "targets": (1 - level) * clean + level * noise}
        torch.testing.assert_close(predict_targets(network, **window), clean)

    def test_residual_is_added_to_the_reference(self, window: dict[str, Any]) -> None:
        network = RecordingNetwork(2 * CHANNELS, prediction_type="residual")
        clean = torch.randn(2, CHANNELS, 2, 4, 6)
        network.output[:, :, SEGMENT.target_slice] = clean - window["reference"][:, :, SEGMENT.target_slice]
        torch.testing.assert_close(predict_targets(network, **window), clean)

    @pytest.mark.parametrize("prediction_type", ["velocity", "residual"])
    def test_float32_whatever_the_network(self, window: dict[str, Any], prediction_type: str) -> None:
        network = RecordingNetwork(2 * CHANNELS, prediction_type=prediction_type, dtype=torch.bfloat16)
        network.output.zero_()
        prediction = predict_targets(network, **window)
        expected = window["targets"] if prediction_type == "velocity" else window["reference"][:, :, 2:4]
        assert prediction.dtype == torch.float32
        assert torch.equal(prediction, expected)


class TestWithTheRealNetwork:
    @pytest.fixture
    def make(self, tiny_wan_dit: Callable[..., Any]) -> Callable[..., StageTwoTransformer]:
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
        self, make: Any, window: dict[str, Any], prediction_type: str, reference_channels: int
    ) -> None:
        transformer = make(reference_channels=reference_channels, prediction_type=prediction_type)
        prediction = predict_targets(transformer, **window)
        assert prediction.shape == (2, CHANNELS, 2, 4, 6)
        assert prediction.isfinite().all()
        changes = {
            "sigma": 0.5,
            "slots": window["slots"].roll(1, dims=0),
            "targets": window["targets"].roll(1, dims=0),
            "position_mode": "compact",
            "prompt_embeds": window["prompt_embeds"].roll(1, dims=0),
        }
        if reference_channels:
            changes["reference"] = window["reference"].roll(1, dims=0)
        for name, value in changes.items():
            other = predict_targets(transformer, **window | {name: value})
            assert (other - prediction).abs().max() > 1e-5, name

    @torch.no_grad()
    def test_training_free_velocity_is_diffusers_own_step(
        self, tiny_wan_dit: Callable[..., Any], window: dict[str, Any]
    ) -> None:
        """One segment that covers the clip, positions 0..F-1: diffusers' class on tokens is the oracle."""
        base = tiny_wan_dit(CHANNELS, CHANNELS)
        (segment,) = plan_segments(5, segment_size=4)
        x = window["slots"]
        timestep = torch.tensor([0.0, 800, 800, 800, 800]).repeat_interleave(6).expand(2, -1)
        velocity = base(x, timestep, window["prompt_embeds"]).sample
        window |= {"segment": segment, "sigma": 0.8, "targets": x[:, :, 1:]}
        prediction = predict_targets(StageTwoTransformer.from_wan(base), **window)
        torch.testing.assert_close(prediction, (x - 0.8 * velocity)[:, :, 1:], rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_level_per_sample(self, make: Any, window: dict[str, Any]) -> None:
        transformer = make(reference_channels=CHANNELS)
        together = predict_targets(transformer, **window | {"sigma": torch.tensor([0.25, 1.0])})
        for index, sigma in enumerate((0.25, 1.0)):
            alone = predict_targets(transformer, **window | {"sigma": sigma})
            torch.testing.assert_close(together[index], alone[index], rtol=0, atol=1e-5)

    def test_trains(self, make: Any, window: dict[str, Any]) -> None:
        transformer = make(reference_channels=CHANNELS)
        predict_targets(transformer, **window | {"sigma": torch.tensor([0.3, 0.9])}).square().mean().backward()
        weight = transformer.patch_embedding.weight
        assert weight.grad is not None
        assert (weight.grad.abs().sum(dim=(0, 2, 3, 4)) > 0).all()


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"targets": torch.zeros(2, CHANNELS, 3, 4, 6)}, "targets is"),
            ({"targets": torch.zeros(2, CHANNELS, 4, 6)}, "targets is"),
            ({"slots": torch.zeros(2, CHANNELS, 4, 4, 6)}, "slots is"),
            ({"reference": torch.zeros(2, CHANNELS, 5, 4, 8)}, "reference is"),
            ({"reference": torch.zeros(1, CHANNELS, 5, 4, 6)}, "reference is"),
            ({"prompt_embeds": torch.zeros(1, 5, 32)}, "prompt_embeds is"),
            ({"sigma": torch.zeros(3)}, "sigma is"),
            ({"sigma": 625.0}, "within 0..1"),
        ],
    )
    def test_shapes_and_level(self, window: dict[str, Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            predict_targets(RecordingNetwork(2 * CHANNELS), **window | changes)

    def test_channels_of_another_codec(self, window: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="takes 96 channels"):
            predict_targets(RecordingNetwork(96), **window)
