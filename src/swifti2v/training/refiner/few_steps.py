"""What the ways to distill Stage II have in common: the student's schedule, and a teacher with its guidance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from swifti2v.errors import ConfigurationError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.training.refiner.windows import WindowBatch, WindowSource, WindowSourceOptions, predicted

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.wan.transformer import StageTwoTransformer


@dataclass(frozen=True)
class FewStepOptions:
    """What the student is to become.

    Args:
        num_student_steps: Euler steps of the student.
        guidance_scale: of the teacher, >= 1; 1 needs half the time.
        flow: windows, context and time shift; its `flow_shift` is that of the student's schedule at inference, and its
            own context is made in `num_student_steps` unless it says how many.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    num_student_steps: int = 4
    guidance_scale: float = 1.0
    flow: WindowSourceOptions = field(default_factory=lambda: WindowSourceOptions(prompt_dropped_share=0.0))

    def __post_init__(self) -> None:
        if self.num_student_steps < 1 or self.guidance_scale < 1:
            msg = "num_student_steps and guidance_scale must be at least 1"
            raise ConfigurationError(msg)

    @property
    def source_options(self) -> WindowSourceOptions:
        """Windows with the context that the student makes at inference."""
        return replace(self.flow, own_context_steps=self.flow.own_context_steps or self.num_student_steps)

    @property
    def student_sigmas(self) -> tuple[float, ...]:
        """The student's schedule, from 1 to 0."""
        return shifted_sigmas(self.num_student_steps, shift=self.flow.flow_shift)


class Teacher:
    """A frozen network with its guidance: the clean prediction that the student is held against.

    Args:
        network: frozen here.
        source: which knows what stands for no words.
        guidance_scale: 1 runs the network once, more runs it twice.
    """

    def __init__(self, network: StageTwoTransformer, *, source: WindowSource, guidance_scale: float) -> None:
        self.network = network.requires_grad_(requires_grad=False).eval()
        self._source = source
        self._guidance_scale = guidance_scale

    @torch.no_grad()
    def __call__(self, batch: WindowBatch, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """Return x0 of the targets [B,C,M,h,w], float32."""
        clean = predicted(self.network, batch, noisy, sigma)
        if self._guidance_scale == 1:
            return clean
        without = replace(batch, prompt_embeds=self._source.without_prompts(batch.prompt_embeds))
        return torch.lerp(predicted(self.network, without, noisy, sigma), clean, self._guidance_scale)
