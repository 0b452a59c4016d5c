"""Stage II in a few steps: what the student makes is distributed as what the teacher makes (DMD2, arXiv 2405.14867).

The student's clean prediction is noised again, and two networks say where it should go from there: the frozen teacher
towards its own distribution, and a critic, which learns by flow matching what the student makes at the moment, towards
the student's. Their difference is the gradient of the divergence between both. The critic takes several steps for each
of the student's (two time scales), and the student meets the levels of its schedule as at inference: from noise, by its
own Euler steps (backward simulation). The paper's loss against real clips by a GAN is left out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.learner import Critic
from swifti2v.training.refiner.few_steps import FewStepOptions, Teacher
from swifti2v.training.refiner.windows import WindowBatch, noise_like, predicted

if TYPE_CHECKING:
    from swifti2v.training.refiner.windows import WindowSource
    from swifti2v.wan.transformer import StageTwoTransformer

SIGMA_LOW, SIGMA_HIGH = 0.02, 0.98
"""Levels at which teacher and critic are asked (published settings): at the ends their difference says nothing."""
SMALLEST_SCALE = 1e-4
"""Of the distance to the teacher by which a gradient is divided: a student that has arrived is left alone."""
PHASE = 2
"""The purpose for which `WindowSource.shared_by_processes` draws a step of the schedule: as many forwards for all."""


@dataclass(frozen=True)
class DistributionMatchingOptions(FewStepOptions):
    """What the student is to become, by distribution matching.

    Args:
        critic_steps_per_step: of the critic's optimizer before each of the student's.
        critic_learning_rate: peak; warm-up and decay are those of the loop.
        critic_betas: of its AdamW; those of the student are the loop's.
        objective: tells the two ways apart; a recipe has to say it, because it means a trajectory without.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    critic_steps_per_step: int = 5
    critic_learning_rate: float = 4e-7
    critic_betas: tuple[float, float] = (0.0, 0.999)
    objective: Literal["distribution_matching"] = "distribution_matching"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_steps_per_step < 1 or self.critic_learning_rate <= 0:
            msg = "critic_steps_per_step must be at least 1 and critic_learning_rate above 0"
            raise ConfigurationError(msg)


class DistributionMatchingObjective:
    """The student's objective; `critic` is the other network with its own, for the loop.

    Args:
        student: what is trained and kept.
        teacher: frozen; the network that the student starts from.
        critic: trained beside the student and dropped; starts as the teacher.
        source: of windows, by `FewStepOptions.source_options`.
        options: see `DistributionMatchingOptions`.
    """

    def __init__(
        self,
        student: StageTwoTransformer,
        teacher: StageTwoTransformer,
        *,
        critic: StageTwoTransformer,
        source: WindowSource,
        options: DistributionMatchingOptions,
    ) -> None:
        self.module: nn.Module = student
        self.options = options
        self._critic = critic
        self._student = StudentsOutput(student, source=source, options=options)
        self._teacher = Teacher(teacher, source=source, guidance_scale=options.guidance_scale)

    @property
    def critic(self) -> Critic:
        """The critic, as the loop takes it."""
        return Critic(
            CriticObjective(self._critic, student=self._student),
            steps_per_step=self.options.critic_steps_per_step,
            learning_rate=self.options.critic_learning_rate,
            betas=self.options.critic_betas,
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return a loss whose gradient by the student's clean prediction is that of the divergence, normalized.

        The number of the log is the distance of that prediction from the teacher's, root of the mean square.
        """
        made = self._student.make(step)
        noisy, sigma = self._student.noised(made)
        with torch.no_grad():
            wanted = self._teacher(made.batch, noisy, sigma)
            expected = predicted(self._critic, made.batch, noisy, sigma)
            distance = made.clean - wanted
            scale = distance.abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=SMALLEST_SCALE)
            target = made.clean - (expected - wanted) / scale
        numbers = {
            "samples": float(len(target)),
            "phase": float(made.phase),
            "to_teacher": float(distance.square().mean().sqrt()),
        }
        return 0.5 * (made.clean - target).square().mean(), numbers


class CriticObjective:
    """Flow matching on what the student makes; the `Objective` of the critic.

    Args:
        critic: what is trained.
        student: what it makes, without gradient.
    """

    def __init__(self, critic: StageTwoTransformer, *, student: StudentsOutput) -> None:
        self.module: nn.Module = critic
        self._critic = critic
        self._student = student

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch: of the velocity or of x0, as the network predicts."""
        with torch.no_grad():
            made = self._student.make(step)
        noisy, sigma = self._student.noised(made)
        error = (predicted(self._critic, made.batch, noisy, sigma) - made.clean).square()
        if self._critic.config.prediction_type == "velocity":
            error = error / sigma.view(-1, 1, 1, 1, 1).square()
        return error.mean(), {}


@dataclass(frozen=True)
class MadeTargets:
    """What the student makes of a batch.

    Args:
        batch: the windows.
        clean: its clean prediction [B,C,M,h,w].
        phase: at which of its steps, from 0.
        generator: of all noise that follows.
    """

    batch: WindowBatch
    clean: Tensor
    phase: int
    generator: torch.Generator


class StudentsOutput:
    """The student at work: the windows of a number, and its clean prediction at one of its steps, met as at inference.

    Args:
        student: as it is at the moment.
        source: of windows.
        options: its schedule.
    """

    def __init__(
        self, student: StageTwoTransformer, *, source: WindowSource, options: DistributionMatchingOptions
    ) -> None:
        self.source = source
        self._student = student
        self._options = options

    def make(self, step: int) -> MadeTargets:
        """Return the prediction of batch number `step`; of the forwards that lead there the last has a gradient."""
        generator = self.source.generator(step)
        batch = self.source.batch(step, generator)
        sigmas = self._options.student_sigmas
        phase = int(self.source.shared_by_processes(step, PHASE).integers(self._options.num_student_steps))
        current = noise_like(batch.targets, generator)
        with torch.no_grad():
            for sigma, following in itertools.pairwise(sigmas[: phase + 1]):
                clean = predicted(self._student, batch, current, sigma)
                current = torch.lerp(clean, current, following / sigma)
        return MadeTargets(batch, predicted(self._student, batch, current, sigmas[phase]), phase, generator)

    def noised(self, made: MadeTargets) -> tuple[Tensor, Tensor]:
        """Return the prediction with new noise, without its gradient, and its levels [B]: uniform, then shifted."""
        shift = self._options.flow.flow_shift
        uniform = torch.rand(len(made.clean), generator=made.generator)
        sigma = (shift * uniform / (1 + (shift - 1) * uniform)).clamp(SIGMA_LOW, SIGMA_HIGH).to(made.clean.device)
        clean = made.clean.detach()
        return torch.lerp(clean, noise_like(clean, made.generator), sigma.view(-1, 1, 1, 1, 1)), sigma
