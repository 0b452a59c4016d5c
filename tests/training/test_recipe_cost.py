"""What a recipe costs, against the windows that training draws and against arithmetic by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from swifti2v.memory.budget import WAN22
from swifti2v.memory.codec_cost import WAN22_VAE

from swifti2v.geometry import Size
from swifti2v.memory.training_cost import TrainingWork, training_memory, window_shares
from swifti2v.memory.transformer_cost import STAGE_TWO_5B, UMT5_XXL
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.recipe_cost import EncodingCost, TrainingCost, cost_of_recipe
from swifti2v.training.refiner.distillation import DistillationOptions
from swifti2v.training.refiner.distribution_matching import DistributionMatchingOptions
from swifti2v.training.refiner.encoding import EncodingOptions
from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun
from swifti2v.training.refiner.segment_flow import SegmentFlowOptions
from swifti2v.training.refiner.transition import TransitionOptions
from swifti2v.training.refiner.validation import ValidationOfRefiner
from swifti2v.training.refiner.windows import WindowOptions

LOOP = LoopOptions(num_steps=100, gradient_accumulation=2)
FIVE = SegmentFlowOptions(windows=WindowOptions(3, full_share=1.0, before_share=1.0, after_share=0.0))
FIVE_TOKENS = 5 * 3520
WORK = TrainingWork(STAGE_TWO_5B, trains_all=True)


def counted(run: RefinerRun | DistillationRun) -> TrainingCost:
    cost = cost_of_recipe(run, WAN22, size=Size(2560, 1408), num_frames=81)
    assert isinstance(cost, TrainingCost)
    return cost


def encoded(encoding: EncodingOptions) -> EncodingCost:
    cost = cost_of_recipe(TransitionRun(encoding=encoding), WAN22, size=Size(640, 352), num_frames=33)
    assert isinstance(cost, EncodingCost)
    return cost


def test_shares_are_those_of_the_windows_that_are_drawn() -> None:
    options, rng, count = WindowOptions(), np.random.default_rng(0), 4000
    drawn = Counter(len(options.draw(rng, 100_000).window) for _ in range(count))
    shares = window_shares(
        options.segment_size,
        full_share=options.full_share,
        before_share=options.before_share,
        after_share=options.after_share,
    )
    assert drawn.keys() == shares.keys()
    for length, share in shares.items():
        assert drawn[length] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_a_refiner_that_always_has_five_frames() -> None:
    cost = counted(RefinerRun(LOOP, batch_size=3, flow=FIVE))
    assert cost.setup.num_tokens == FIVE_TOKENS
    assert cost.tflop_per_sample == pytest.approx(WORK.step_tflop(FIVE_TOKENS))
    assert cost.num_samples(8) == 100 * 2 * 3 * 8


def test_own_context_is_a_forward_of_the_segment_before() -> None:
    own = replace(FIVE, own_context_share=0.5, own_context_steps=2)
    plain, dearer = counted(RefinerRun(LOOP, flow=FIVE)), counted(RefinerRun(LOOP, flow=own))
    forward = STAGE_TWO_5B.forward_cost(FIVE_TOKENS).tflop
    assert dearer.tflop_per_sample - plain.tflop_per_sample == pytest.approx(0.5 * 2 * forward)
    chain = counted(RefinerRun(LOOP, flow=replace(own, own_context_segments=3)))  # one, two or three segments
    assert chain.tflop_per_sample - plain.tflop_per_sample == pytest.approx(0.5 * 2 * 2 * forward)


def test_validation_is_every_step_of_every_segment_of_its_clips() -> None:
    """21 latent frames in seven windows: the first has no neighbour, and the last has two targets."""
    loop = replace(LOOP, num_steps=1000, validate_every=250)
    judged = counted(RefinerRun(loop, flow=FIVE, validation=ValidationOfRefiner(num_samples=9, num_steps=10)))
    plain = counted(RefinerRun(loop, flow=FIVE))
    four, five = (STAGE_TWO_5B.forward_cost(frames * 3520).tflop for frames in (4, 5))
    clip = 10 * (2 * four + 5 * five)
    assert judged.tflop(1) - plain.tflop(1) == pytest.approx(4 * 9 * clip)
    assert judged.tflop(8) - plain.tflop(8) == pytest.approx(4 * 16 * clip)  # nine clips on eight cards: two rounds
    assert plain.tflop(8) == pytest.approx(plain.num_samples(8) * plain.tflop_per_sample)
    shared = counted(RefinerRun(replace(loop, context_parallel=2), validation=ValidationOfRefiner(num_samples=9)))
    assert shared.validation.tflop(4) == pytest.approx(4 * 12 * clip)
    student = DistillationRun(loop, validation=ValidationOfRefiner(num_samples=9))
    assert counted(student).validation.tflop_per_clip == pytest.approx(clip * 4 / 10)


def test_a_teacher_adds_its_forwards() -> None:
    plain = counted(RefinerRun(LOOP, flow=FIVE))
    options = DistillationOptions(4, teacher_steps_per_step=5, guidance_scale=3.0, flow=FIVE)
    taught = counted(DistillationRun(LOOP, distillation=options))
    forward = STAGE_TWO_5B.forward_cost(FIVE_TOKENS).tflop
    assert taught.tflop_per_sample - plain.tflop_per_sample == pytest.approx(10 * forward)
    assert taught.setup.has_teacher
    assert not plain.setup.has_teacher


def test_a_critic_adds_its_steps_and_a_third_network() -> None:
    """Of a sample, by hand: two turns of the critic and one of the student, half a step on the way to each."""
    options = DistributionMatchingOptions(2, guidance_scale=3.0, flow=FIVE, critic_steps_per_step=2)
    cost = counted(DistillationRun(LOOP, distillation=options))
    forward, trained = STAGE_TWO_5B.forward_cost(FIVE_TOKENS).tflop, WORK.step_tflop(FIVE_TOKENS)
    critic_turn = 0.5 * forward + forward + trained  # to the step, the student's prediction, the critic's own pass
    student_turn = 0.5 * forward + trained + 2 * forward + forward  # the teacher with guidance, the critic
    assert cost.tflop_per_sample == pytest.approx(2 * critic_turn + student_turn)
    own = replace(FIVE, own_context_share=0.5)
    dearer = counted(DistillationRun(LOOP, distillation=replace(options, flow=own)))
    assert dearer.tflop_per_sample - cost.tflop_per_sample == pytest.approx(3 * 0.5 * 2 * forward)
    alone = counted(DistillationRun(LOOP, distillation=DistillationOptions(2, flow=FIVE)))
    ours, theirs = (training_memory(each.setup) for each in (cost, alone))
    weights = STAGE_TWO_5B.num_parameters
    assert ours.weight_bytes - theirs.weight_bytes == 4 * weights
    assert ours.optimizer_bytes - theirs.optimizer_bytes == 8 * weights
    assert (ours.gradient_bytes, ours.average_bytes) == (theirs.gradient_bytes, theirs.average_bytes)


def test_a_cache_of_references_counts_its_encodings() -> None:
    """Without Stage I: the truth and the reduced clip in each mode; with it, the reduced clip redrawn as well."""
    encoding = WAN22_VAE.encode_tflop(Size(2560, 1408), 81)
    prompt = UMT5_XXL.forward_cost(512).tflop
    unchanged = encoded(EncodingOptions(transition=None, unchanged=True, modes=("transport", "replace")))
    assert unchanged.tflop_per_clip == pytest.approx(3 * encoding + prompt)
    one_level = TransitionOptions(sigma_low=0.8, sigma_high=0.9, num_variants=1)
    redrawn = encoded(EncodingOptions(transition=one_level, modes=("replace",)))
    # From 5/6 on the schedule has two levels: two forwards of 731 TFLOP, and the codec of Stage I.
    stage_one = redrawn.tflop_per_clip - 2 * encoding - prompt
    forward = WAN22.stage_one.forward_cost(18480).tflop
    codec, size = WAN22.stage_one_codec, Size(640, 352)
    assert stage_one == pytest.approx(2 * forward + 2 * codec.encode_tflop(size, 81) + codec.decode_tflop(size, 81))
