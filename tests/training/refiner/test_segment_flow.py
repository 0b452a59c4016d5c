"""Stage II's objective: the loss is flow matching on the targets, and context is truth, reference or own output."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from swifti2v.config import from_mapping
from swifti2v.errors import ConfigurationError, LatentCacheError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.segments import Segment
from swifti2v.training.refiner import windows
from swifti2v.training.refiner.distillation import DistillationObjective, DistillationOptions
from swifti2v.training.refiner.segment_flow import SegmentFlowObjective, SegmentFlowOptions
from swifti2v.training.refiner.windows import (
    ClipBatch,
    WindowBatch,
    WindowOptions,
    WindowSource,
    earlier_segments,
    noise_like,
    predicted,
    sample_targets,
    with_own_context,
)
from swifti2v.wan.transformer import StageTwoTransformer
from tests.training.engine.matching_runs import CHANNELS, Sample, Steps, make_sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import WanTransformer3DModel

EXACT = SegmentFlowOptions(context_noise=0.0, prompt_dropped_share=0.0)


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(seed) for seed in range(3)]


@pytest.fixture
def transformer(tiny_wan_dit: Callable[..., WanTransformer3DModel]) -> StageTwoTransformer:
    network = StageTwoTransformer.from_wan(tiny_wan_dit(), reference_channels=CHANNELS)
    with torch.no_grad():
        network.patch_embedding.weight[:, CHANNELS:].normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return network


def objective(
    transformer: StageTwoTransformer, samples: list[Sample], options: SegmentFlowOptions = EXACT
) -> SegmentFlowObjective:
    return SegmentFlowObjective(transformer, samples=samples, batches=Steps(), options=options)


def loss_of(of: Any, step: int) -> float:
    return float(of.loss(step)[0].detach())


def train(of: Any, steps: int, learning_rate: float = 3e-3) -> list[float]:
    optimizer = torch.optim.Adam([p for p in of.module.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(steps):
        loss, _ = of.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_loss_is_that_of_the_velocity(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    """Recomputed from the network's own output: the mean of |v - (noise - x0)|^2 over the targets."""
    options = replace(EXACT, pure_noise_share=1.0, windows=WindowOptions(before_share=1.0, after_share=1.0))
    of = objective(transformer, samples, options)
    source = WindowSource(transformer, samples=samples, batches=Steps(), options=options)
    generator = source.generator(4)
    batch = source.batch(4, generator)
    torch.rand(2, generator=generator), torch.rand(2, generator=generator)  # levels, and which of them are 1
    noise = noise_like(batch.targets, generator)
    slots = batch.slots.clone()
    slots[:, :, batch.segment.target_slice] = noise
    timestep = torch.zeros(2, len(batch.segment.window))
    timestep[:, batch.segment.target_slice] = 1000.0
    velocity = transformer(
        torch.cat([slots, batch.reference], dim=1),
        timestep,
        batch.prompt_embeds,
        frame_positions=torch.tensor(batch.segment.window),
        frame_kinds=torch.tensor(batch.segment.kinds),
    ).sample[:, :, batch.segment.target_slice]
    expected = (velocity - (noise - batch.targets)).square().mean()
    assert loss_of(of, 4) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_loss_is_a_function_of_the_step(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    of = objective(transformer, samples, replace(EXACT, own_context_share=0.5))
    losses = [loss_of(of, step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_training_lowers_the_loss(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    losses = train(objective(transformer, samples), 60, 1e-2)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_only_the_adapter_is_trained(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    transformer.requires_grad_(requires_grad=False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "ffn.net.2"]))
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    train(objective(transformer, samples), 2)
    changed = {name for name, weight in transformer.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_own_context_is_what_the_network_makes(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    windows = WindowOptions(segment_size=1, before_share=1.0, after_share=0.0)
    options = replace(EXACT, windows=windows, own_context_share=1.0)
    source = WindowSource(transformer, samples=samples, batches=Steps(), options=options)
    batch = source.batch(0, source.generator(0))
    assert len(batch.segment.before) == 1
    assert torch.equal(batch.slots[:, :, 0], batch.truth[:, :, 0])  # the anchor
    assert not torch.allclose(batch.slots[:, :, 1], batch.truth[:, :, 1], atol=0.1)
    assert torch.equal(batch.slots[:, :, 1], batch.reference[:, :, 1])  # written back, as at inference
    assert not batch.slots.requires_grad
    with torch.no_grad():  # other weights, another context
        transformer.proj_out.weight.mul_(2)
    assert not torch.equal(source.batch(0, source.generator(0)).slots[:, :, 1], batch.slots[:, :, 1])


def test_own_context_is_handed_on_as_at_inference(
    transformer: StageTwoTransformer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments back: the second sees the end of the first, not the truth; the window sees the end of the second."""
    seen: list[Tensor] = []
    made: list[Tensor] = []

    def remembered(network: StageTwoTransformer, batch: WindowBatch, **options: Any) -> Tensor:
        seen.append(batch.slots)
        made.append(sample_targets(network, batch, **options))
        return made[-1]

    monkeypatch.setattr(windows, "sample_targets", remembered)
    truth = torch.stack([sample.tensors["latents"] for sample in samples])
    reference = torch.stack([sample.tensors["reference.0"] for sample in samples])
    prompts = torch.stack([sample.tensors["prompt_embeds"] for sample in samples])
    segment = Segment(index=0, targets=range(4, 5), before=range(3, 4), after=range(0))
    batch = with_own_context(
        transformer,
        ClipBatch(truth, reference, prompts),
        segment,
        earlier=earlier_segments(segment, segment_size=2, count=2),
        sigmas=(1.0, 0.0),
        context_noise=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert [each.shape[2] for each in made] == [1, 2]  # frame 1, frames 2 and 3
    assert torch.equal(seen[1][:, :, 1], made[0][:, :, 0])
    assert torch.equal(batch.slots[:, :, 1], made[1][:, :, 1])
    assert torch.equal(batch.targets, truth[:, :, 4:5])


def test_processes_make_their_own_context_together(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    """A sharded network's forward is a meeting of all processes: each must run as many."""
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    windows = WindowOptions(segment_size=1)
    options = replace(EXACT, windows=windows, own_context_share=0.5, own_context_segments=2)
    source = WindowSource(transformer, samples=samples, batches=Steps(), options=options, num_processes=2)
    counts = []
    for draw in range(24):
        calls.clear()
        source.batch(draw, source.generator(draw))
        counts.append(len(calls))
    assert counts[::2] == counts[1::2]
    assert set(counts) == {0, 1, 2}


def test_processes_have_windows_of_one_shape(transformer: StageTwoTransformer) -> None:
    """The others would wait for the longest; only at the ends of a clip there is less to see. Places are their own."""
    long = [Sample("long", {"latents": torch.zeros(CHANNELS, 60, 1, 1), "prompt_embeds": torch.zeros(1, 32)})] * 3
    for sample in long:
        sample.tensors["reference.0"] = sample.tensors["latents"]
    options = replace(EXACT, windows=WindowOptions(anchor_share=0.5))
    source = WindowSource(transformer, samples=long, batches=Steps(), options=options, num_processes=2)
    segments = [source.batch(draw, source.generator(draw)).segment for draw in range(80)]
    pairs = list(zip(segments[::2], segments[1::2], strict=True))
    for one, other in pairs:
        assert (len(one.targets), one.anchor) == (len(other.targets), other.anchor)
        if all(each.targets.start > 1 and each.targets.stop < 60 for each in (one, other)):
            assert one.kinds == other.kinds
    assert len({one.kinds for one, _ in pairs}) > 8
    assert sum(one.targets.start != other.targets.start for one, other in pairs) > 30


def test_a_batch_is_read_once_and_ahead(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    asked: list[int] = []

    class Noted(Steps):
        def batch_of(self, step: int) -> list[int]:
            asked.append(step)
            return super().batch_of(step)

    options = replace(EXACT, own_context_share=0.5)
    source = WindowSource(transformer, samples=samples, batches=Noted(), options=options)
    found = [source.batch(step, source.generator(step)) for step in (0, 2, 4, 6)]
    assert asked[:5] == [0, 1, 2, 4, 6]  # from the second on it is known how far the numbers are apart
    for step, batch in zip((0, 2, 4, 6), found, strict=True):
        alone = WindowSource(transformer, samples=samples, batches=Steps(), options=options)
        assert torch.equal(batch.slots, alone.batch(step, alone.generator(step)).slots)


def test_dropped_prompts_are_the_empty_one(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    def prompts(share: float, empty: Tensor | None) -> Tensor:
        options = replace(EXACT, prompt_dropped_share=share)
        source = WindowSource(transformer, samples=samples, batches=Steps(), options=options, empty_prompt=empty)
        return torch.cat([source.batch(step, source.generator(step)).prompt_embeds for step in range(40)])

    empty = torch.full((7, 32), 3.0)
    assert bool((prompts(1.0, empty) == 3).all())
    assert not prompts(1.0, None).any()
    dropped = (prompts(0.25, empty) == 3).all(dim=(1, 2)).float().mean()
    assert 0.1 < float(dropped) < 0.4
    assert not (prompts(0.0, empty) == 3).any()


def test_reference_is_left_out_below_its_level(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    """With weights that only look at the reference, leaving it out changes the loss, and only at low noise."""
    always = objective(transformer, samples)
    late = objective(transformer, samples, replace(EXACT, keep_reference_above=1.0))
    assert any(loss_of(always, step) != loss_of(late, step) for step in range(6))
    pure = replace(EXACT, pure_noise_share=1.0)
    kept = objective(transformer, samples, replace(pure, keep_reference_above=1.0))
    whole = objective(transformer, samples, pure)
    assert all(loss_of(kept, step) == loss_of(whole, step) for step in range(6))


def test_cache_without_references(transformer: StageTwoTransformer, samples: list[Sample]) -> None:
    bare = [Sample(s.name, {k: v for k, v in s.tensors.items() if not k.startswith("reference")}) for s in samples]
    with pytest.raises(LatentCacheError, match=r"'clip 0'.*holds latents, prompt_embeds, but not reference.0"):
        objective(transformer, bare).loss(0)


@pytest.mark.parametrize("options", [{"pure_noise_share": 2.0}, {"flow_shift": 0.0}, {"own_context_segments": 0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"within 0..1|above 0|at least 1"):
        SegmentFlowOptions(**options)


class TestDistillation:
    options = DistillationOptions(num_student_steps=2, teacher_steps_per_step=4, flow=EXACT)

    def make(
        self,
        transformer: StageTwoTransformer,
        tiny_wan_dit: Callable[..., WanTransformer3DModel],
        samples: list[Sample],
        options: DistillationOptions | None = None,
    ) -> DistillationObjective:
        teacher = StageTwoTransformer.from_wan(tiny_wan_dit(), reference_channels=CHANNELS)
        teacher.load_state_dict(transformer.state_dict())
        with torch.no_grad():  # a field that bends: with plain random weights few steps lead as far as many
            for network in (teacher, transformer):
                network.proj_out.weight.mul_(6)
        chosen = options or self.options
        source = WindowSource(transformer, samples=samples, batches=Steps(), options=chosen.source_options)
        return DistillationObjective(transformer, teacher, source=source, options=chosen)

    def gap(self, of: DistillationObjective, samples: list[Sample]) -> float:
        """Mean squared distance of the student's two steps from the teacher's eight, on windows not trained on."""
        source = WindowSource(of.module, samples=samples, batches=Steps(), options=self.options.flow)
        gaps = []
        for step in range(1000, 1006):
            batch = source.batch(step, source.generator(step))
            few, many = (
                sample_targets(network, batch, sigmas=sigmas, generator=torch.Generator().manual_seed(step))
                for network, sigmas in (
                    (of.module, shifted_sigmas(2, shift=self.options.flow.flow_shift)),
                    (of._teacher.network, self.options.teacher_sigmas),
                )
            )
            gaps.append(float((few - many).square().mean()))
        return sum(gaps) / len(gaps)

    def test_own_context_is_made_in_the_students_steps(self) -> None:
        assert DistillationOptions(num_student_steps=4).source_options.num_own_context_steps == 4
        asked = DistillationOptions(4, flow=replace(self.options.flow, own_context_steps=2))
        assert asked.source_options.num_own_context_steps == 2
        assert SegmentFlowOptions().num_own_context_steps == 1

    @pytest.mark.parametrize("key", ["pure_noise_share", "keep_reference_above"])
    def test_what_it_does_not_read_is_refused(self, key: str) -> None:
        with pytest.raises(ConfigurationError, match=f"unknown key '{key}'"):
            from_mapping(DistillationOptions, {"flow": {key: 0.5}})
        assert getattr(from_mapping(SegmentFlowOptions, {key: 0.5}), key) == 0.5

    def test_students_levels_are_the_teachers(self) -> None:
        student = shifted_sigmas(2, shift=self.options.flow.flow_shift)
        assert self.options.teacher_sigmas[::4] == pytest.approx(student)

    def test_prediction_leads_where_the_teacher_goes(
        self,
        transformer: StageTwoTransformer,
        tiny_wan_dit: Callable[..., WanTransformer3DModel],
        samples: list[Sample],
    ) -> None:
        """One Euler step along the target ends where the teacher's four end, computed here by the velocity form."""
        of = self.make(transformer, tiny_wan_dit, samples)
        source = WindowSource(transformer, samples=samples, batches=Steps(), options=EXACT)
        generator = source.generator(0)
        batch = source.batch(0, generator)
        start = noise_like(batch.targets, generator)
        sigmas = self.options.teacher_sigmas[:5]
        wanted = of.teacher_prediction(batch, start, sigmas)
        current = start
        with torch.no_grad():
            for sigma, following in pairwise(sigmas):
                velocity = (current - predicted(of._teacher.network, batch, current, sigma)) / sigma
                current = current + (following - sigma) * velocity
        led = start + (sigmas[-1] - sigmas[0]) * (start - wanted) / sigmas[0]
        assert torch.allclose(led, current, atol=1e-4)

    @pytest.mark.slow
    def test_student_comes_nearer_to_the_teacher(
        self,
        transformer: StageTwoTransformer,
        tiny_wan_dit: Callable[..., WanTransformer3DModel],
        samples: list[Sample],
    ) -> None:
        of = self.make(transformer, tiny_wan_dit, samples)
        before = self.gap(of, samples)
        train(of, 120, 1e-3)
        assert self.gap(of, samples) < 0.5 * before

    def test_teacher_is_not_trained(
        self,
        transformer: StageTwoTransformer,
        tiny_wan_dit: Callable[..., WanTransformer3DModel],
        samples: list[Sample],
    ) -> None:
        of = self.make(transformer, tiny_wan_dit, samples)
        before = {name: weight.clone() for name, weight in of._teacher.network.state_dict().items()}
        train(of, 2)
        assert all(torch.equal(weight, before[name]) for name, weight in of._teacher.network.state_dict().items())

    def test_guidance_is_against_the_empty_prompt(
        self,
        transformer: StageTwoTransformer,
        tiny_wan_dit: Callable[..., WanTransformer3DModel],
        samples: list[Sample],
    ) -> None:
        """With a sample's own words as the empty prompt there is nothing to guide away from; else the target moves."""
        alike = [replace(each, tensors=each.tensors | {"prompt_embeds": torch.ones(7, 32)}) for each in samples]
        of = self.make(transformer, tiny_wan_dit, alike)
        plain = loss_of(of, 0)
        for empty, is_plain in ((torch.ones(7, 32), True), (torch.zeros(7, 32), False)):
            options = replace(self.options, guidance_scale=3.0)
            source = WindowSource(
                transformer, samples=alike, batches=Steps(), options=options.source_options, empty_prompt=empty
            )
            guided = DistillationObjective(transformer, of._teacher.network, source=source, options=options)
            assert (loss_of(guided, 0) == pytest.approx(plain, rel=1e-4)) is is_plain

    @pytest.mark.parametrize("options", [{"num_student_steps": 0}, {"guidance_scale": 0.5}])
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(ConfigurationError, match="at least 1"):
            DistillationOptions(**options)
