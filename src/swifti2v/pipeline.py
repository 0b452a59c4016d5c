"""SwiftI2V on one page (paper, figure "method"): image and prompt in, a high-resolution video out.

    image, prompt -> Stage I -> motion reference -> hybrid reference -> Stage II, segment by segment -> decode -> frames

This page is the method and nothing else; every arrow is an iterator, so memory does not grow with the length of the
clip. What stands around it is in `runner/`: loading, placement in memory, the retry after out of memory, stages that
are loaded in turn, the thread that works ahead. Read on at `stage_one.py`, `reference/hybrid.py`, `stage_two.py` and
`sampling/segmented.py`, where a window is assembled and its result is written back into the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.media.images import image_to_tensor
from swifti2v.pixels import to_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.runs import Progress
from swifti2v.stage_one import PromptEmbeds
from swifti2v.stage_two_light import refine_by_light

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from swifti2v.runs import GenerationRequest, OnProgress
    from swifti2v.segments import Segment
    from swifti2v.stage_one import MotionStage
    from swifti2v.stage_two import StageTwo
    from swifti2v.wan.streaming import VideoDecoder
    from swifti2v.work_directory import WorkDirectory


@dataclass(frozen=True)
class SwiftI2V:
    """The method over loaded networks.

    Everything finished is kept in a `WorkDirectory` and taken from there when it exists already, so that any run can
    be killed, or fail, and go on.

    Args:
        stage_one: makes the motion reference.
        stage_two: refines the hybrid reference.
        decoder: turns finished latents into frames; most often the codec of `stage_two`.
        device: where hybrid reference and Stage II work.
    """

    stage_one: MotionStage
    stage_two: StageTwo
    decoder: VideoDecoder
    device: torch.device

    def stream(self, request: GenerationRequest, work: WorkDirectory, report: OnProgress) -> Iterator[Tensor]:
        """Make a video; yield its frames, uint8 [f,H,W,3], one latent frame at a time: f = 1, then 4, 4, ..."""
        prompt = self.encode_prompt(request, work)
        motion = self.motion_reference(request, prompt, work, report)
        yield from self.refine(request, motion, prompt, work, report)

    def preview(self, request: GenerationRequest, work: WorkDirectory, report: OnProgress) -> Iterator[Tensor]:
        """Make the motion reference only; yield its frames, uint8 [n,h,w,3]."""
        prompt = self.encode_prompt(request, work)
        yield from self.motion_reference(request, prompt, work, report)

    def encode_prompt(self, request: GenerationRequest, work: WorkDirectory) -> PromptEmbeds:
        """Return the prompt, and the negative prompt where a stage has guidance, as both stages read them."""
        texts = request.texts
        return PromptEmbeds(**work.prompt(texts, lambda: self.stage_one.encode_prompt(*texts).tensors()))

    def motion_reference(
        self, request: GenerationRequest, prompt: PromptEmbeds, work: WorkDirectory, report: OnProgress
    ) -> Iterator[Tensor]:
        """Run Stage I; yield its frames, uint8 [n,h,w,3], when all of them are on disk."""

        def make() -> Iterator[Tensor]:
            return self.stage_one.generate(
                request.image,
                prompt,
                request.settings,
                size=request.motion_size,
                on_step=lambda step, total: report(Progress("stage_one", step + 1, total)),
            )

        return work.motion_reference(make)

    def refine(
        self,
        request: GenerationRequest,
        motion: Iterator[Tensor],
        prompt: PromptEmbeds,
        work: WorkDirectory,
        report: OnProgress,
    ) -> Iterator[Tensor]:
        """Bring a motion reference to the size of the output with the detail of the image; yield as `stream` does."""
        settings, image = request.settings, image_to_tensor(request.image).to(self.device)
        if settings.refiner == "light":
            num_segments = len(self.stage_two.plan(settings))
            yield from refine_by_light(
                motion,
                image,
                work,
                segment_size=settings.segment_size,
                flow_scale=settings.flow_scale,
                on_segment=lambda number: report(Progress("stage_two", number, num_segments, number, num_segments)),
            )
            return
        reference = hybrid_reference(
            motion,
            image,
            options=ReferenceOptions(mode=settings.reference, flow_scale=settings.flow_scale),
            device=self.device,
            temporal_factor=self.stage_two.geometry.temporal,
        )
        if settings.refiner == "none":
            yield from map(to_uint8, reference)
            return
        num_segments, num_steps = len(self.stage_two.plan(settings)), settings.num_inference_steps

        def on_step(segment: Segment, step: int, _num_steps: int) -> None:
            done = segment.index * num_steps + step + 1
            report(Progress("stage_two", done, num_segments * num_steps, segment.index + 1, num_segments))

        latents = self.stage_two.refine(
            reference,
            settings,
            prompt_embeds=prompt.prompt,
            negative_prompt_embeds=prompt.negative,
            finished=work.segment,
            on_step=on_step,
        )
        yield from self.decoder.decode_stream(work.keep_segments(latents))
