"""`Parts`: what a checkpoint gives a pipeline, loaded or described."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size, motion_size
from swifti2v.stage_one import StageOne
from swifti2v.wan.checkpoints import PARTS

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline

    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.runner.ahead import Overlap
    from swifti2v.runs import GenerationRequest
    from swifti2v.settings import GenerationSettings, Quantization
    from swifti2v.stage_one import MotionStage
    from swifti2v.stage_two import StageTwo
    from swifti2v.wan.checkpoints import Part
    from swifti2v.wan.streaming import VideoDecoder


@dataclass(frozen=True)
class Parts:
    """What a checkpoint gives a pipeline.

    Args:
        name: of the checkpoint, with a digest of its checksums where its index has them.
        stage_one, stage_two: loaded, but for those not in `stages`, whose networks have no weights.
        defaults: settings that the checkpoint recommends.
        other_defaults: the same for the other value of `few_step`; None: there is none.
        motion_reduction: output size over motion size.
        motion_max_area: pixels of a motion frame at most, None for no limit.
        few_step_ways: values of `few_step` that the loaded weights can sample with: one, where the few-step adapters
            are in the weights or were left out of them, and both, where the checkpoint has none.
        device: where hybrid reference and Stage II work.
        memory: what a run may take; None: everything is on `device`.
        overlap: what runs beside the denoising of the next segment.
        decoder: what decodes finished segments; None: Stage II's codec.
        quantization: what the linear layers of the transformers' blocks multiply.
        stages: that can be run.
    """

    name: str
    stage_one: MotionStage
    stage_two: StageTwo
    defaults: GenerationSettings
    other_defaults: GenerationSettings | None = None
    motion_reduction: float = 4.0
    motion_max_area: int | None = None
    few_step_ways: tuple[bool, ...] = (True, False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: MemoryLimits | None = None
    overlap: Overlap = "decode"
    decoder: VideoDecoder | None = None
    quantization: Quantization = "none"
    stages: tuple[Part, ...] = PARTS

    def defaults_of(self, few_step: bool | None) -> GenerationSettings:
        """Return the settings that the checkpoint recommends for a way of Stage I; None: for that of `defaults`."""
        if self.other_defaults is None or few_step in {None, self.defaults.few_step}:
            return self.defaults
        return self.other_defaults

    def motion_size(self, size: Size) -> Size:
        """Return the size of the motion reference of an output of `size`."""
        multiple = self.stage_one.geometry.size_multiple
        return motion_size(size, reduction=self.motion_reduction, max_area=self.motion_max_area, multiple=multiple)

    def check(self, settings: GenerationSettings) -> None:
        """Raise `InvalidInputError` for settings that these stages cannot run."""
        self.stage_two.plan(settings)
        self.stage_one.plan(settings.num_frames)
        self.stage_two.check_refiner(settings)
        self.stage_one.check_settings(settings)
        if settings.few_step not in self.few_step_ways:
            state = "are part of" if self.few_step_ways[0] else "were left out of"
            way = "few steps" if settings.few_step else "many steps"
            msg = f"the few-step adapters {state} the loaded weights; load with few_step={settings.few_step} for {way}"
            raise InvalidInputError(msg, param="few_step", value=settings.few_step)

    @property
    def pipeline(self) -> WanImageToVideoPipeline | None:
        """Stage I's pipeline of diffusers, where Stage I is held and is one."""
        return self.stage_one.pipeline if "stage_one" in self.stages and isinstance(self.stage_one, StageOne) else None

    @property
    def transformers(self) -> tuple[Any, ...]:
        """The transformers that are held: of Stage I one or two experts (none of `mini`), of Stage II the refiner."""
        one = self.pipeline
        experts = () if one is None else (one.transformer, one.transformer_2)
        refiners = (self.stage_two.transformer,) if "stage_two" in self.stages else ()
        return tuple(network for network in (*experts, *refiners) if network is not None)

    def prompt_notes(self, request: GenerationRequest) -> tuple[str, ...]:
        """Say that the prompt is empty or cut, what of it does nothing, and what is known of its motion."""
        empty = () if request.prompt.strip() else ("the prompt is empty: what moves is left to the model",)
        notes = (*empty, *self.stage_one.notes_of(*request.texts))
        if "stage_one" not in self.stages and isinstance(self.stage_one, StageOne):
            return notes  # its networks have no weights; those of `mini` are always loaded
        image, size = request.image, request.motion_size
        return (*notes, *self.stage_one.motion_notes(image, request.prompt, request.settings, size=size))
