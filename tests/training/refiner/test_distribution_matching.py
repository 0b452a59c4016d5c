"""Distribution matching: its gradient, its critic, the way to a step, and that a student's distribution is moved."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v.config import from_mapping, load_yaml
from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.refiner.distillation import DistillationOptions
from swifti2v.training.refiner.distribution_matching import (
    SIGMA_HIGH,
    SIGMA_LOW,
    DistributionMatchingOptions,
)
from swifti2v.training.refiner.run import DistillationRun
from swifti2v.training.refiner.windows import WindowSourceOptions, noise_like, predicted, sample_targets
from tests.training.engine.matching_runs import CHANNELS, OPTIONS, matching_objective, stage_two

if TYPE_CHECKING:
    from swifti2v.wan.transformer import StageTwoTransformer

LOOP = LoopOptions(num_steps=4, learning_rate=1e-3, warmup_steps=1, checkpoint_every=4, log_every=1, bfloat16=False)


def loss_of(of: Any, step: int) -> float:
    return float(of.loss(step)[0].detach())


def moved(network: StageTwoTransformer, by: float) -> StageTwoTransformer:
    """Change what a network predicts everywhere."""
    with torch.no_grad():
        network.proj_out.bias += by
    return network


def test_the_gradient_is_the_difference_of_the_predictions() -> None:
    """Recomputed at the levels and with the noise of the step: (critic - teacher) / mean |student - teacher|."""
    of = matching_objective(critic=moved(stage_two(), 0.5))
    made = of._student.make(3)
    noisy, sigma = of._student.noised(made)
    with torch.no_grad():
        fake, real = (predicted(each, made.batch, noisy, sigma) for each in (of._critic, of._teacher.network))
    scale = (made.clean.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = (fake - real) / scale / made.clean.numel()
    seen: list[Tensor] = []
    student, plain = of._student, of._student.make

    def watched(step: int) -> Any:
        again = plain(step)
        again.clean.register_hook(seen.append)
        return again

    student.make = watched  # type: ignore[method-assign]
    of.loss(3)[0].backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, atol=1e-7, rtol=1e-3)
    assert float(seen[0].abs().max()) > 0


def test_without_a_difference_there_is_no_gradient() -> None:
    """A critic that says what the teacher says leaves the student alone; and one that does not, does not."""
    assert loss_of(matching_objective(), 0) == 0
    assert loss_of(matching_objective(critic=moved(stage_two(), 0.5)), 0) > 0.01


def test_a_student_that_has_arrived_is_not_thrown_away() -> None:
    """Where student and teacher agree to the last bit, the divisor is not zero."""
    constant = stage_two(prediction_type="residual")
    with torch.no_grad():  # the residual is nothing: all of them predict the reference
        constant.proj_out.weight.zero_()
        constant.proj_out.bias.zero_()
    of = matching_objective(student=constant, teacher=constant, critic=constant)
    loss, numbers = of.loss(0)
    assert numbers["to_teacher"] == 0
    assert float(loss) == 0  # and not 0 / 0


def test_guidance_is_the_teachers_alone() -> None:
    empty, calls = torch.ones(7, 32), []
    for guidance, expected in ((1.0, 1), (3.0, 2)):
        calls.clear()
        of = matching_objective(options=replace(OPTIONS, guidance_scale=guidance), empty_prompt=empty)
        of._teacher.network.register_forward_hook(lambda *_: calls.append(1))
        of.loss(0)
        assert len(calls) == expected


def test_a_step_is_reached_as_at_inference() -> None:
    """At its last step the student's clean prediction is what its sampler makes from the same noise."""
    of = matching_objective(options=replace(OPTIONS, num_student_steps=3))
    phases = {}
    for step in range(12):
        made = of._student.make(step)
        phases[made.phase] = step
    assert phases.keys() == {0, 1, 2}
    source, sigmas = of._student.source, of._student._options.student_sigmas
    generator = source.generator(phases[2])
    batch = source.batch(phases[2], generator)
    expected = sample_targets(of.module, batch, sigmas=sigmas, generator=generator)
    torch.testing.assert_close(of._student.make(phases[2]).clean.detach(), expected, atol=1e-5, rtol=1e-5)


def test_only_the_last_forward_has_a_gradient() -> None:
    plain = replace(OPTIONS.flow, own_context_share=0.0)
    of = matching_objective(options=replace(OPTIONS, num_student_steps=3, flow=plain))
    with_gradient: list[bool] = []
    of.module.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    for step in range(6):
        with_gradient.clear()
        _, numbers = of.loss(step)
        assert with_gradient == [False] * int(numbers["phase"]) + [True]
        with_gradient.clear()
        of.critic.objective.loss(step)
        assert with_gradient == [False] * (int(numbers["phase"]) + 1)


def test_processes_walk_equally_far() -> None:
    """A sharded network's forward is a meeting of all processes; what they see is their own."""
    of = matching_objective(options=replace(OPTIONS, num_student_steps=4), num_processes=2)
    made = [of._student.make(draw) for draw in range(16)]
    phases = [each.phase for each in made]
    assert phases[::2] == phases[1::2]
    assert len(set(phases)) > 2
    assert not torch.equal(made[0].clean, made[1].clean)


@pytest.mark.parametrize("prediction_type", ["velocity", "residual"])
def test_the_critic_learns_by_flow_matching(prediction_type: str) -> None:
    """Its loss, from its own output: |v - (noise - x0)|^2 with the student's x0, or |x0 - the student's|^2."""
    networks = {name: stage_two(prediction_type=prediction_type) for name in ("student", "teacher", "critic")}
    of = matching_objective(**networks)
    loss = loss_of(of.critic.objective, 5)
    made = of._student.make(5)
    clean = made.clean.detach()
    uniform = torch.rand(len(clean), generator=made.generator)
    shift = OPTIONS.flow.flow_shift
    sigma = (shift * uniform / (1 + (shift - 1) * uniform)).clamp(SIGMA_LOW, SIGMA_HIGH)
    level = sigma.view(-1, 1, 1, 1, 1)
    noise = noise_like(clean, made.generator)
    noisy = (1 - level) * clean + level * noise
    with torch.no_grad():
        x0 = predicted(of._critic, made.batch, noisy, sigma)
    error = x0 - clean if prediction_type == "residual" else (noisy - x0) / level - (noise - clean)
    assert loss == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_each_network_is_trained_by_its_own_loss() -> None:
    of = matching_objective(critic=moved(stage_two(), 0.5))
    networks = {"student": of.module, "teacher": of._teacher.network, "critic": of._critic}
    for objective, trained in ((of, "student"), (of.critic.objective, "critic")):
        objective.loss(0)[0].backward()
        touched = {name for name, each in networks.items() if any(p.grad is not None for p in each.parameters())}
        assert touched == {trained}
        networks[trained].zero_grad(set_to_none=True)


class Gaussian(nn.Module):
    """The exact network of latents N(mean, deviation^2), all alike: the velocity of their posterior mean."""

    config = SimpleNamespace(in_channels=CHANNELS, prediction_type="velocity")
    dtype = torch.float32

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.mean, self.log_deviation = (nn.Parameter(torch.tensor(each)) for each in (mean, math.log(deviation)))

    def forward(self, hidden_states: Tensor, timestep: Tensor, _prompts: Tensor, **others: Any) -> SimpleNamespace:
        noisy = hidden_states[:, :, others["output_frames"]]
        sigma = timestep[:, others["output_frames"]].amax(dim=1).view(-1, 1, 1, 1, 1) / 1000
        return SimpleNamespace(sample=(noisy - self.clean(noisy, sigma)) / sigma)

    def clean(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance, kept = (2 * self.log_deviation).exp(), 1 - sigma
        share = kept * variance / (kept.square() * variance + sigma.square())
        return self.mean + share * (noisy - kept * self.mean)


class Scaled(Gaussian):
    """A generator of one step: noise of the deviation, around the mean."""

    def clean(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return self.mean + self.log_deviation.exp() * noisy


def test_mean_and_spread_become_those_of_the_teacher(tmp_path: Path) -> None:
    """Known distributions: the student ends where teacher and data are, in its spread too, which regression loses."""
    student, teacher, critic = Scaled(0.8, 0.3), Gaussian(-0.5, 1.2), Gaussian(-0.5, 1.2)
    flow = WindowSourceOptions(prompt_dropped_share=0.0)
    options = DistributionMatchingOptions(1, flow=flow, critic_learning_rate=0.05)
    networks: Any = {"student": student, "teacher": teacher, "critic": critic}
    of = matching_objective(**networks, options=options)
    loop = replace(LOOP, num_steps=150, learning_rate=0.05, betas=(0.0, 0.99), checkpoint_every=150)
    TrainingLoop(of, tmp_path, loop, critic=of.critic).run()
    mean, deviation = float(student.mean.detach()), float(student.log_deviation.detach().exp())
    assert mean == pytest.approx(-0.5, abs=0.1)
    assert deviation == pytest.approx(1.2, abs=0.15)
    assert float(critic.mean.detach()) == pytest.approx(mean, abs=0.15)  # it has followed


class TestOptions:
    def test_a_recipe_says_which(self) -> None:
        loop = {"num_steps": 1}
        runs = [
            from_mapping(DistillationRun, {"loop": loop, "distillation": given})
            for given in ({}, {"objective": "trajectory"}, {"objective": "distribution_matching"})
        ]
        kinds = [type(run.distillation) for run in runs]
        assert kinds == [DistillationOptions, DistillationOptions, DistributionMatchingOptions]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"objective": "consistency"}, r"objective: 'trajectory' or 'distribution_matching'"),
            ({"critic_steps_per_step": 3}, "distillation.DistillationOptions: unknown key 'critic_steps_per_step'"),
            (
                {"objective": "distribution_matching", "teacher_steps_per_step": 3},
                "distillation.DistributionMatchingOptions: unknown key 'teacher_steps_per_step'",
            ),
            (
                {"objective": "distribution_matching", "critic_learning_rate": "low"},
                "distillation.DistributionMatchingOptions.critic_learning_rate: 'low' cannot be used",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            from_mapping(DistillationRun, {"loop": {"num_steps": 1}, "distillation": given})

    @pytest.mark.parametrize(
        "options", [{"critic_steps_per_step": 0}, {"critic_learning_rate": 0.0}, {"num_student_steps": 0}]
    )
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(ConfigurationError, match="at least 1"):
            DistributionMatchingOptions(**options)

    def test_the_recipe_of_the_full_size_has_the_published_settings(self) -> None:
        recipe = Path(__file__).parents[3] / "recipes" / "wan2.2" / "distill_distribution_matching.yaml"
        run = load_yaml(DistillationRun, recipe)
        options = run.distillation
        assert isinstance(options, DistributionMatchingOptions)
        assert (options.critic_steps_per_step, options.critic_learning_rate, options.critic_betas) == (
            5,
            4e-7,
            (0, 0.999),
        )
        assert (run.loop.learning_rate, run.loop.betas, run.loop.ema_decay) == (2e-6, (0, 0.999), 0.99)
