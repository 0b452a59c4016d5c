"""What a recipe costs: each part of a training adds what it should, on a tiny pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swifti2v.geometry import Size
from swifti2v.memory.networks import STAGE_TWO, WAN22, Network
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.recipe_cost import MACHINES, Machine, TrainingCost, cost_of_recipe
from swifti2v.training.refiner.distillation import DistillationOptions
from swifti2v.training.refiner.distribution_matching import DistributionMatchingOptions
from swifti2v.training.refiner.network import NetworkOptions
from swifti2v.training.refiner.run import DistillationRun, RefinerRun
from swifti2v.training.refiner.segment_flow import SegmentFlowOptions
from swifti2v.training.refiner.validation import ValidationOfRefiner
from swifti2v.training.refiner.windows import WindowOptions
from swifti2v.training.step_cost import measured_flops

TINY = Network.of(
    STAGE_TWO,
    WAN22.stage_two.config
    | {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3, "text_dim": 16},
)
NETWORKS = replace(WAN22, stage_two=TINY, text_tokens=8)
LOOP = LoopOptions(num_steps=100, gradient_accumulation=2)
# Windows of five frames: the segment size is that of the clip's segments, so that few are cut short at its end.
FIVE = SegmentFlowOptions(windows=WindowOptions(3, full_share=1.0, before_share=1.0, after_share=0.0))
SIZE, FRAMES = Size(128, 96), 81


def cost_of(run: RefinerRun | DistillationRun) -> TrainingCost:
    cost = cost_of_recipe(run, NETWORKS, size=SIZE, num_frames=FRAMES)
    assert isinstance(cost, TrainingCost)
    return cost


def forward_of(cost: TrainingCost, num_frames: int = 5) -> float:
    _, _, height, width = cost.setup.latent_shape
    return measured_flops(cost.setup.network, (1, num_frames, height, width), text_tokens=8).forward


def test_samples_and_the_longest_window() -> None:
    cost = cost_of(RefinerRun(LOOP, batch_size=3, flow=FIVE))
    assert cost.setup.num_tokens == 5 * 4 * 3
    assert cost.num_samples(8) == 100 * 2 * 3 * 8
    assert cost.tflop(8) == cost.num_samples(8) * cost.tflop_per_sample


def test_own_context_adds_forwards_of_the_segments_before() -> None:
    own = replace(FIVE, own_context_share=1.0, own_context_steps=2)
    plain, dearer = cost_of(RefinerRun(LOOP, flow=FIVE)), cost_of(RefinerRun(LOOP, flow=own))
    forward = forward_of(plain)
    assert dearer.tflop_per_sample - plain.tflop_per_sample == pytest.approx(2 * forward, rel=0.25)


def test_validation_is_every_step_of_every_segment_of_its_clips() -> None:
    """21 latent frames in seven windows: the first has no neighbor, and the last has two targets."""
    loop = replace(LOOP, num_steps=1000, validate_every=250)
    judged = cost_of(RefinerRun(loop, flow=FIVE, validation=ValidationOfRefiner(num_samples=9, num_steps=10)))
    clip = 10 * (2 * forward_of(judged, 4) + 5 * forward_of(judged, 5))
    plain = judged.num_samples(1) * judged.tflop_per_sample
    assert judged.tflop(1) - plain == pytest.approx(4 * 9 * clip)
    assert judged.tflop(8) - 8 * plain == pytest.approx(4 * 16 * clip)  # nine clips on eight cards: two rounds


def test_a_teacher_and_a_critic_add_their_passes_and_weights() -> None:
    plain = cost_of(RefinerRun(LOOP, flow=FIVE))
    forward, step = forward_of(plain), plain.tflop_per_sample
    taught = cost_of(DistillationRun(LOOP, distillation=DistillationOptions(4, guidance_scale=3.0, flow=FIVE)))
    assert taught.tflop_per_sample - step == pytest.approx(10 * forward, rel=0.02)
    options = DistributionMatchingOptions(2, guidance_scale=3.0, flow=FIVE, critic_steps_per_step=2)
    matched = cost_of(DistillationRun(LOOP, distillation=options))
    # Half a step on the way to each of three turns; what two of them learn from; teacher with guidance, and critic.
    assert matched.tflop_per_sample == pytest.approx(3 * step + (1.5 + 2 + 2 + 1) * forward, rel=0.02)
    one, two, three = (each.setup.device_bytes(1) for each in (plain, taught, matched))
    weights = one.weights // 4
    assert (two.weights - one.weights, three.weights - two.weights) == (2 * weights, 4 * weights)
    assert (three.optimizer, three.gradients, three.average) == (2 * one.optimizer, one.gradients, one.average)


def test_sharding_divides_what_is_held() -> None:
    setup = cost_of(RefinerRun(LOOP, flow=FIVE)).setup
    one, eight = setup.device_bytes(1), setup.device_bytes(8)
    for name in ("weights", "gradients", "optimizer", "average"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, abs=1)
    assert (one.gathered, eight.activations) == (0, one.activations)
    assert replace(setup, context_parallel=8).device_bytes(8).activations == one.activations // 8
    assert replace(setup, optimizer="adamw8bit").device_bytes(1).optimizer < 0.26 * one.optimizer


@pytest.mark.parametrize("share", [0.999, 0.8, 0.5, 0.1])
def test_every_way_to_fit_does_and_nothing_smaller_would(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = cost_of(
        RefinerRun(LOOP, batch_size=2, flow=FIVE, network=NetworkOptions(gradient_checkpointing=False))
    ).setup
    limit = int(share * setup.device_bytes(1).peak)
    monkeypatch.setattr(Machine, "holds", lambda _self, num_bytes: num_bytes <= limit)
    machine = MACHINES[0]
    ways, changes = setup.ways_to_fit(machine), setup._changes(1)
    assert not setup.fits(machine)
    assert all(setup._changed(way, changes).fits(machine) for way in ways)
    assert all(len(way) == len(ways[0]) for way in ways)
    if ways and len(ways[0]) > 1:
        assert not any(setup._changed((name,), changes).fits(machine) for name in changes)
