"""The whole system (paper, figure "method"): image and prompt -> motion reference -> hybrid reference -> video."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from swifti2v.errors import InvalidInputError, WorkDirectoryError
from swifti2v.media.images import as_loaded_image, fit_image, fit_notes, image_to_tensor
from swifti2v.pipelines.ahead import made_ahead
from swifti2v.pipelines.fitting import frames_within_limits
from swifti2v.pipelines.loading import load_parts
from swifti2v.pipelines.run_store import RunStore
from swifti2v.pipelines.runs import FinishedFrames, GenerationRequest, Progress, Video
from swifti2v.pipelines.stage_one import PromptEmbeds
from swifti2v.pixels import to_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.settings import check_prompt, checked_choices
from swifti2v.wan.quantized_products import quantization_of

if TYPE_CHECKING:
    from swifti2v.pipelines.acceleration import Acceleration
    from swifti2v.pipelines.fitting import MemoryLimits
    from swifti2v.pipelines.loading import Parts
    from swifti2v.pipelines.runs import OnProgress
    from swifti2v.segments import Segment
    from swifti2v.settings import GenerationSettings
    from swifti2v.wan.checkpoints import Part


class TwoStagePipeline:
    """Both stages of a checkpoint.

    ```python
    pipe = TwoStagePipeline.from_pretrained("mini")
    video = pipe("photo.jpg", "the camera zooms in", size=Size(1280, 704), num_frames=81, seed=7)
    video.save("video.mp4")
    ```
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._encoded: tuple[tuple[str, str | None], PromptEmbeds] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        few_step: bool = True,
        memory: MemoryLimits | None = None,
        acceleration: Acceleration | None = None,
    ) -> TwoStagePipeline:
        """Load a checkpoint: a name (`mini`, `wan2.2`), a folder, or a Hugging Face repository.

        Args:
            name_or_path: see `swifti2v.wan.checkpoints`.
            device: default: the CUDA device if there is one, else the CPU.
            dtype: of the networks; default: bfloat16 on CUDA, float32 on the CPU.
            revision: of a repository.
            local_files_only: never download.
            few_step: with the few-step adapters of Stage I; False for the many-step way of the base model.
            memory: limits, for which every run is planned (`MemoryLimits.parse("24GiB")`); None: all on the device.
            acceleration: attention, compilation, decoder, several cards; None: native attention, nothing else.

        Raises:
            CheckpointError: it cannot be found, downloaded or read.
            InvalidInputError: there is no such device, or it cannot be accelerated so.
        """
        parts = load_parts(
            name_or_path,
            device=device,
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
            few_step=few_step,
            memory=memory,
            acceleration=acceleration,
        )
        return cls(parts)

    @classmethod
    def of_stage(cls, name_or_path: str | Path, stage: Part, **options: Any) -> TwoStagePipeline:
        """Load one stage of a checkpoint, for a work directory that two pipelines share, on two cards or machines.

        One of Stage I makes previews only; one of Stage II streams from a work directory in which a preview was made
        with the same request. Arguments as in `load_parts`.
        """
        return cls(load_parts(name_or_path, stages=(stage,), **options))

    @property
    def defaults(self) -> GenerationSettings:
        """Settings that the checkpoint recommends."""
        return self.parts.defaults

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | str | Path,
        prompt: str = "",
        *,
        generator: torch.Generator | None = None,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
        **choices: Any,
    ) -> Video:
        """Make a video and hold all of it in memory; `stream` hands it out as it is made.

        Args:
            image: a PIL image or a path; brought to upright RGB, cropped to the aspect of the output and resized.
            prompt: what should move, and how.
            generator: draws the seed, instead of `seed`.
            work_dir: keep the motion reference and finished segments there, and continue from what it holds.
            on_progress: see `OnProgress`.
            **choices: fields of `GenerationSettings`, ``num_frames=81, seed=7``; what is left out or None is as the
                checkpoint recommends.

        Raises:
            InvalidInputError: image, prompt or an option cannot be used; the message names the fix.
            WorkDirectoryError: `work_dir` belongs to another run.
        """
        request = self.request(image, prompt, generator=generator, **choices)
        notes = (*request.notes, *self.prompt_notes(request))
        with closing(self.stream(request, work_dir=work_dir, on_progress=on_progress)) as pieces:
            frames = torch.cat([piece.frames for piece in pieces])
        return Video(frames, request.settings.fps, notes)

    def request(
        self,
        image: PIL.Image.Image | str | Path,
        prompt: str = "",
        *,
        generator: torch.Generator | None = None,
        **choices: Any,
    ) -> GenerationRequest:
        """Check everything that can be checked before work begins, and fit the image; arguments as in a call.

        Raises:
            InvalidInputError: as in a call.
        """
        chosen = checked_choices(choices)
        settings = self.parts.defaults_of(chosen.get("few_step")).settled(chosen)
        if generator is not None:
            settings = _with_seed(settings, generator)
        self.parts.stage_two.plan(settings)
        self.parts.stage_one.plan(settings.num_frames)
        self.parts.stage_two.check_refiner(settings)
        self.parts.check_few_step(settings.few_step)
        self.parts.stage_one.check_settings(settings)
        check_prompt(prompt)
        loaded = as_loaded_image(image)
        of_image = (*loaded.notes, *fit_notes(loaded.image, settings.size))
        notes = (*of_image, *settings.notes(chosen), *self.parts.motion_notes(prompt))
        return GenerationRequest(fit_image(loaded.image, settings.size), prompt, settings, notes)

    def stream(
        self,
        request: GenerationRequest,
        *,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield frames as segments finish; memory does not grow with the length of the clip.

        Whoever stops early should close the iterator: that ends its threads and removes what it keeps on the disk.

        Raises:
            InvalidInputError: while iterating, if the pipeline holds Stage I alone.
            WorkDirectoryError: while iterating, if `work_dir` belongs to another run or is damaged, or if the pipeline
                holds Stage II alone and no preview was made there.
            OutputError: while iterating, if `work_dir` cannot be written.
        """
        if "stage_two" not in self.parts.stages:
            raise InvalidInputError("this pipeline holds Stage I alone; make a preview, or load both stages")
        report = on_progress or _ignore

        def make(parts: Parts, store: RunStore) -> Iterator[Tensor]:
            return self._frames(parts, request, store, report)

        with closing(self._run(request, work_dir, make)) as pieces:
            for piece in pieces:
                yield piece
                report(Progress("frames", piece.first_frame + len(piece.frames), request.settings.num_frames))

    def _run(
        self,
        request: GenerationRequest,
        work_dir: str | Path | None,
        make: Callable[[Parts, RunStore], Iterator[Tensor]],
    ) -> Generator[FinishedFrames, None, None]:
        """Yield the frames that `make` makes with networks placed as the limits of memory have it."""
        with RunStore.open(Path(work_dir) if work_dir is not None else None) as store:
            done = 0
            attempts = frames_within_limits(self.parts, request.settings, lambda parts: make(parts, store))
            with closing(attempts) as pieces:
                for frames in pieces:
                    yield FinishedFrames(done, frames)
                    done += len(frames)

    def _frames(
        self, parts: Parts, request: GenerationRequest, store: RunStore, report: OnProgress
    ) -> Iterator[Tensor]:
        """Yield the frames of a run, uint8 [f,H,W,3], a latent frame at a time."""
        if "stage_one" in parts.stages:
            embeds = self._encode_prompt(request)
            self._make_motion_reference(parts, request, embeds, store, report)
        else:
            embeds = self._handed_over(request, store)
        reference = _made_reference(parts, request, store)
        if request.settings.refiner == "none":
            yield from map(to_uint8, reference)
        else:
            yield from _refined(parts, reference, request, embeds, store, report)

    def preview(
        self,
        request: GenerationRequest,
        *,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield the motion reference, at its own size; `stream` with the same `work_dir` continues from it.

        Raises:
            InvalidInputError: while iterating, if the pipeline holds Stage II alone.
            WorkDirectoryError, OutputError: as in `stream`.
        """
        if "stage_one" not in self.parts.stages:
            raise InvalidInputError("this pipeline holds Stage II alone, and a preview is Stage I; load both stages")
        report = on_progress or _ignore

        def make(parts: Parts, store: RunStore) -> Iterator[Tensor]:
            embeds = self._encode_prompt(request)
            self._make_motion_reference(parts, request, embeds, store, report)
            store.keep_prompt(self._texts(request), embeds.tensors())
            yield from map(torch.from_numpy, store.motion.chunks())

        yield from self._run(request, work_dir, make)

    def prompt_notes(self, request: GenerationRequest) -> tuple[str, ...]:
        """Return what there is to say of the prompt: that it is empty, or cut at the encoder's limit."""
        empty = () if request.prompt.strip() else ("the prompt is empty: what moves is left to the model",)
        # Within limits of memory the text encoder has its place only while a run goes on.
        if self.parts.memory is not None or "stage_one" not in self.parts.stages:
            texts = zip(("prompt", "negative prompt"), self._texts(request), strict=True)
            cut = (self.parts.stage_one.cut_note(name, text or "") for name, text in texts)
            return (*empty, *(note for note in cut if note is not None))
        return (*empty, *self._encode_prompt(request).notes)

    def _encode_prompt(self, request: GenerationRequest) -> PromptEmbeds:
        texts = self._texts(request)
        if self._encoded is None or self._encoded[0] != texts:  # the notes of a prompt are asked for before the run
            self._encoded = (texts, self.parts.stage_one.encode_prompt(*texts))
        return self._encoded[1]

    def _texts(self, request: GenerationRequest) -> tuple[str, str | None]:
        settings = request.settings
        guided = max(settings.guidance_scale, settings.stage_one_guidance_scale) > 1
        return request.prompt, settings.negative_prompt if guided else None

    def _handed_over(self, request: GenerationRequest, store: RunStore) -> PromptEmbeds:
        """Return the prompt as a pipeline with Stage I has read it for the motion reference in the store."""
        store.claim_motion(request.settings.stage_one_identity() | self._identity(request))
        if not store.motion.is_complete:
            msg = f"{store.directory} holds no finished motion reference; run Stage I there first"
            raise WorkDirectoryError(msg)
        kept = store.prompt(self._texts(request))
        return PromptEmbeds(kept["prompt"], kept.get("negative"))

    def _make_motion_reference(
        self, parts: Parts, request: GenerationRequest, embeds: PromptEmbeds, store: RunStore, report: OnProgress
    ) -> None:
        """Run Stage I into the store, unless the store holds its result."""
        settings = request.settings
        store.claim_motion(settings.stage_one_identity() | self._identity(request))
        if store.motion.is_complete:
            return
        store.motion.clear()
        size = parts.motion_size(settings.size)
        pieces = parts.stage_one.generate(
            request.image.resize(size, PIL.Image.Resampling.LANCZOS),
            None,
            settings,
            size=size,
            prompt_embeds=embeds,
            on_step=lambda step, total: report(Progress("stage_one", step + 1, total)),
        )
        for piece in pieces:
            store.motion.append(piece.numpy())
        store.motion.complete({"size": str(size)})

    def _identity(self, request: GenerationRequest) -> dict[str, str]:
        digest = hashlib.sha256(request.image.tobytes()).hexdigest()
        dtype = str(self.parts.stage_two.transformer.dtype).removeprefix("torch.")
        return {"image": digest, "prompt": request.prompt, "checkpoint": self.parts.name, "dtype": dtype}


def _made_reference(parts: Parts, request: GenerationRequest, store: RunStore) -> Iterator[Tensor]:
    """Yield the hybrid reference of the motion reference in the store, [1,3,f,H,W], f = 1, 4, 4, ..."""
    settings = request.settings
    return hybrid_reference(
        (torch.from_numpy(frames) for frames in store.motion.chunks()),
        image_to_tensor(request.image),
        options=ReferenceOptions(mode=settings.reference, flow_scale=settings.flow_scale),
        device=parts.device,
        temporal_factor=parts.stage_two.geometry.temporal,
    )


def _refined(
    parts: Parts,
    reference: Iterator[Tensor],
    request: GenerationRequest,
    embeds: PromptEmbeds,
    store: RunStore,
    report: OnProgress,
) -> Iterator[Tensor]:
    """Run Stage II and decode, side by side; yield uint8 [f,H,W,3], a latent frame at a time."""
    settings = request.settings
    stage_two = parts.stage_two
    products = quantization_of(stage_two.transformer)
    # Named only where it is inexact: work directories of exact runs stay what they were.
    inexact = {} if products == "none" else {"quantization": products}
    store.claim_segments(settings.stage_two_identity() | inexact)
    num_segments = len(stage_two.plan(settings))
    num_steps = settings.num_inference_steps

    def kept(notify: OnProgress) -> Iterator[Tensor]:
        def on_step(segment: Segment, step: int, _num_steps: int) -> None:
            done, number = segment.index * num_steps + step + 1, segment.index + 1
            notify(Progress("stage_two", done, num_segments * num_steps, number, num_segments))

        refined = stage_two.refine(
            reference,
            settings,
            prompt_embeds=embeds.prompt,
            negative_prompt_embeds=embeds.negative,
            finished=store.segment,
            on_step=on_step,
        )
        for item in refined:
            if item.segment is not None and not store.has(item.segment):
                store.save_segment(item.segment, item.latents)
            yield item.latents
            del item  # or it would live on while the next segment is made

    decoder = parts.decoder or stage_two.codec

    def decoded(notify: OnProgress) -> Iterator[Tensor]:
        yield from decoder.decode_stream(kept(notify))

    # The reader of the frames writes a file, most often; so frames at least are made ahead of it.
    match parts.overlap:
        case "decode":
            latents = made_ahead(kept, on_event=report, device=parts.device)
            with closing(latents):
                yield from decoder.decode_stream(latents)
        case "write":
            yield from made_ahead(decoded, on_event=report, device=parts.device)
        case "none":
            yield from decoded(report)


def _with_seed(settings: GenerationSettings, generator: torch.Generator) -> GenerationSettings:
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return replace(settings, seed=int(seed))


def _ignore(_progress: Progress) -> None:
    """Report to nobody."""
