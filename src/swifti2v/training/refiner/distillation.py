"""Stage II in a few steps: the student learns where the teacher's trajectory leads (trajectory distillation).

The student's schedule divides the teacher's; at the start of each of its steps the teacher integrates to their end in
many small steps, and the student is regressed to the clean prediction that takes it there in one. The map is a function
(an ODE), so that regression does not average over outcomes, and no second network has to be trained beside the student,
as distribution matching needs. Guidance of the teacher is built in: the student runs without.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from swifti2v.errors import ConfigurationError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.training.refiner.few_steps import FewStepOptions, Teacher
from swifti2v.training.refiner.windows import WindowBatch, noise_like, predicted

if TYPE_CHECKING:
    from swifti2v.training.refiner.windows import WindowSource
    from swifti2v.wan.transformer import StageTwoTransformer


@dataclass(frozen=True)
class DistillationOptions(FewStepOptions):
    """What the student is to become, by trajectory distillation.

    Args:
        teacher_steps_per_step: the teacher's steps within one of the student's.
        objective: tells the two ways apart.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    teacher_steps_per_step: int = 5
    objective: Literal["trajectory"] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_steps_per_step < 1:
            msg = "teacher_steps_per_step must be at least 1"
            raise ConfigurationError(msg)

    @property
    def teacher_sigmas(self) -> tuple[float, ...]:
        """The teacher's schedule; every `teacher_steps_per_step`-th level is one of the student's."""
        return shifted_sigmas(self.num_student_steps * self.teacher_steps_per_step, shift=self.flow.flow_shift)


class DistillationObjective:
    """Regress the student's clean prediction to the end of the teacher's trajectory; the `Objective` of distillation.

    Args:
        student: what is trained.
        teacher: frozen; the network that the student starts from.
        source: of windows, by `FewStepOptions.source_options`.
        options: see `DistillationOptions`.
    """

    def __init__(
        self,
        student: StageTwoTransformer,
        teacher: StageTwoTransformer,
        *,
        source: WindowSource,
        options: DistillationOptions,
    ) -> None:
        self.module: nn.Module = student
        self.options = options
        self._student = student
        self._source = source
        self._teacher = Teacher(teacher, source=source, guidance_scale=options.guidance_scale)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the mean squared distance to the teacher's clean prediction at one level of the schedule."""
        generator = self._source.generator(step)
        batch = self._source.batch(step, generator)
        per_step = self.options.teacher_steps_per_step
        phase = int(torch.randint(self.options.num_student_steps, (1,), generator=generator))
        sigmas = self.options.teacher_sigmas[phase * per_step : (phase + 1) * per_step + 1]
        noisy = torch.lerp(batch.targets, noise_like(batch.targets, generator), sigmas[0])
        wanted = self.teacher_prediction(batch, noisy, sigmas)
        error = (predicted(self._student, batch, noisy, sigmas[0]) - wanted).square().mean()
        return error, {"phase": float(phase), "teacher_error": float((wanted - batch.targets).square().mean())}

    @torch.no_grad()
    def teacher_prediction(self, batch: WindowBatch, noisy: Tensor, sigmas: tuple[float, ...]) -> Tensor:
        """Return the clean prediction [B,C,M,h,w] that takes one Euler step where the teacher goes in many.

        Args:
            batch: the windows.
            noisy: targets at ``sigmas[0]``.
            sigmas: levels of the teacher, from the start of a student's step to its end.
        """
        current = noisy
        for sigma, following in itertools.pairwise(sigmas):
            # `euler` ends at 0; here the end is a level of the student, so that the step is written out.
            current = torch.lerp(self._teacher(batch, current, sigma), current, following / sigma)
        kept = sigmas[-1] / sigmas[0]
        return (current - kept * noisy) / (1 - kept)
