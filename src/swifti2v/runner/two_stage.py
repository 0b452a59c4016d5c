"""`TwoStagePipeline`: the method (`swifti2v.pipeline`) for people, with all that is around it.

A run is a request, a work directory and one or more attempts at `SwiftI2V.stream`: an attempt that runs out of memory
is followed by one with a tighter plan, which finds in the work directory what the first has finished. Where the host
has room for one stage at a time, each stage is loaded for its turn, and the work directory lies between them.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swifti2v.errors import InvalidInputError, WorkDirectoryError
from swifti2v.media.images import as_loaded_image, fit_image, fit_notes
from swifti2v.memory.heap import trim_heap
from swifti2v.pipeline import SwiftI2V
from swifti2v.runner.ahead import decoder_ahead, in_readers_thread
from swifti2v.runner.fitting import frames_within_limits
from swifti2v.runner.in_turn import stages_fit_together
from swifti2v.runner.loading import load_parts
from swifti2v.runs import FinishedFrames, GenerationRequest, Progress, Video
from swifti2v.settings import check_prompt, checked_choices
from swifti2v.wan.checkpoints import PARTS
from swifti2v.work_directory import WorkDirectory

if TYPE_CHECKING:
    import PIL.Image

    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.runner.acceleration import Acceleration
    from swifti2v.runner.parts import Parts
    from swifti2v.runs import OnProgress
    from swifti2v.settings import GenerationSettings
    from swifti2v.wan.checkpoints import Part

    Make = Callable[[SwiftI2V, GenerationRequest, WorkDirectory, OnProgress], Iterator[Tensor]]


class TwoStagePipeline:
    """Both stages of a checkpoint.

    ```python
    pipe = TwoStagePipeline.from_pretrained("mini")
    video = pipe("photo.jpg", "the camera zooms in", size=(1280, 704), num_frames=81, seed=7)
    video.save("video.mp4")
    ```

    Args:
        parts: the stages, of which those in `parts.stages` are loaded.
        load: loads the stages that it is given the names of; None: `parts` are all there is.
    """

    def __init__(self, parts: Parts, load: Callable[[tuple[Part, ...]], Parts] | None = None) -> None:
        self.parts = parts
        self._load = load

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

    @classmethod
    def describe(cls, name_or_path: str | Path, **options: Any) -> TwoStagePipeline:
        """Read the configurations of a checkpoint and no weights: requests are checked before minutes of loading.

        `load` loads the weights; without it each stage is loaded for its turn in every run. Arguments as in
        `from_pretrained`.
        """
        load = partial(load_parts, name_or_path, **options)
        return cls(load(stages=()), lambda stages: load(stages=stages))

    def load(self, settings: GenerationSettings) -> None:
        """Load what a run of `settings` needs, unless the limits of memory have no room for both stages at once.

        With the refiners `light` and `none` that is Stage I alone, and later runs of this pipeline have no other.

        Raises:
            CheckpointError: the weights cannot be downloaded or read.
            MemoryBudgetError: not even one stage at a time fits.
        """
        if self._load is None:
            return
        if not settings.denoises_segments:
            self.parts, self._load = self._load(("stage_one",)), None
        elif stages_fit_together(self.parts, settings):
            self.parts, self._load = self._load(PARTS), None

    @property
    def loads_in_turn(self) -> bool:
        """Whether each stage is loaded for its turn, and let go of after it."""
        return self._load is not None

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
            generator: draws the seed, instead of ``seed=...``.
            work_dir: keep the motion reference and finished segments there, and continue from what it holds.
            on_progress: see `OnProgress`.
            **choices: fields of `GenerationSettings`, ``num_frames=81, seed=7``; what is not named is left to the
                checkpoint.

        Raises:
            InvalidInputError: image, prompt or an option cannot be used; the message names the fix.
            WorkDirectoryError: `work_dir` belongs to another run.
        """
        request = self.request(image, prompt, generator=generator, **choices)
        with closing(self.stream(request, work_dir=work_dir, on_progress=on_progress)) as pieces:
            frames = torch.cat([piece.frames for piece in pieces])
        return Video(frames, request.settings.fps, request.notes)

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
        parts, chosen = self.parts, checked_choices(choices)
        settings = parts.defaults_of(chosen.get("few_step")).settled(chosen)
        if generator is not None:
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
            settings = replace(settings, seed=int(seed))
        parts.check(settings)
        check_prompt(prompt)
        loaded = as_loaded_image(image)
        notes = (*loaded.notes, *fit_notes(loaded.image, settings.size), *settings.notes(chosen))
        fitted = fit_image(loaded.image, settings.size)
        request = GenerationRequest(fitted, prompt, settings, parts.motion_size(settings.size))
        return replace(request, notes=(*notes, *parts.prompt_notes(request)))

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
            InvalidInputError: while iterating, if the pipeline holds Stage I alone, and the refiner needs Stage II.
            WorkDirectoryError: while iterating, if `work_dir` belongs to another run or is damaged, or if the pipeline
                holds Stage II alone and no preview was made there.
            OutputError: while iterating, if `work_dir` cannot be written.
        """
        if self.parts.stages == ("stage_one",) and request.settings.denoises_segments:
            raise InvalidInputError("this pipeline holds Stage I alone; make a preview, or load both stages")
        report = on_progress or _ignore
        with WorkDirectory.open(work_dir) as work:
            self._claim_motion(request, work)
            if self.loads_in_turn and not work.has_stage_one(request.texts):
                for piece in self._run("stage_one", request, work, report, SwiftI2V.preview):
                    del piece
            for piece in self._run("stage_two", request, work, report, SwiftI2V.stream):
                yield piece
                report(Progress("frames", piece.first_frame + len(piece.frames), request.settings.num_frames))

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
        if self.parts.stages == ("stage_two",):
            raise InvalidInputError("this pipeline holds Stage II alone, and a preview is Stage I; load both stages")
        with WorkDirectory.open(work_dir) as work:
            self._claim_motion(request, work)
            yield from self._run("stage_one", request, work, on_progress or _ignore, SwiftI2V.preview)

    def _run(
        self,
        stage: Part,
        request: GenerationRequest,
        work: WorkDirectory,
        report: OnProgress,
        make: Make,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield what `make` makes of loaded stages; where they are loaded in turn, load `stage` and let go of it."""
        if self._load is None:
            yield from _frames(self.parts, request, work, report, make)
            return
        try:
            needed = stage == "stage_one" or request.settings.denoises_segments
            yield from _frames(self._load((stage,) if needed else ()), request, work, report, make)
        finally:
            _give_back()

    def _claim_motion(self, request: GenerationRequest, work: WorkDirectory) -> None:
        identity = {
            "image": hashlib.sha256(request.image.tobytes()).hexdigest(),
            "prompt": request.prompt,
            "checkpoint": self.parts.name,
            "dtype": str(self.parts.stage_two.transformer.dtype).removeprefix("torch."),
        }
        work.claim_motion(request.settings.stage_one_identity() | identity)


def _frames(
    parts: Parts, request: GenerationRequest, work: WorkDirectory, report: OnProgress, make: Make
) -> Generator[FinishedFrames, None, None]:
    """Yield what `make` makes with networks placed as the limits of memory have it, in one attempt or more."""
    if "stage_one" not in parts.stages and not work.has_stage_one(request.texts):
        msg = f"{work.directory} holds no finished motion reference of this prompt; run Stage I there first"
        raise WorkDirectoryError(msg, param="work_dir", value=str(work.directory))
    if make is SwiftI2V.stream and request.settings.refiner != "none":
        # Named only where Stage II is inexact: work directories of exact runs stay what they were.
        inexact = {} if parts.quantization == "none" else {"quantization": parts.quantization}
        work.claim_segments(request.settings.stage_two_identity() | inexact)

    def attempt(placed: Parts) -> Iterator[Tensor]:
        decoder = decoder_ahead(placed.decoder or placed.stage_two.codec, placed.overlap, placed.device)
        method = SwiftI2V(placed.stage_one, placed.stage_two, decoder, placed.device)
        return make(method, request, work, in_readers_thread(report))

    done = 0
    with closing(frames_within_limits(parts, request.settings, attempt)) as pieces:
        for frames in pieces:
            yield FinishedFrames(done, frames)
            done += len(frames)


def _give_back() -> None:
    """Give memory back that networks took to which nothing refers any more: their hooks make reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch since 2.9
        if empty_host_cache is not None:
            empty_host_cache()
    trim_heap()


def _ignore(_progress: Progress) -> None:
    """Report to nobody."""
