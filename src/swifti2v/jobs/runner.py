"""A job as a run of the pipeline: the growing video, its thumbnail and its spritesheet."""

from __future__ import annotations

import gc
import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, Self

from swifti2v.errors import DeviceLostError, GenerationCancelled
from swifti2v.geometry import Size
from swifti2v.jobs.pictures import Spritesheet, save_thumbnail
from swifti2v.jobs.state import ALL_STAGES, JobProgress, JobResult, JobStage
from swifti2v.media.video_writer import VideoWriter
from swifti2v.memory.device_errors import broken_devices
from swifti2v.settings import checked_choices
from swifti2v.work_directory import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from swifti2v.jobs.files import AttemptFiles
    from swifti2v.jobs.worker import Task
    from swifti2v.runner.acceleration import Acceleration
    from swifti2v.runner.two_stage import TwoStagePipeline
    from swifti2v.runs import FinishedFrames, GenerationRequest, OnProgress, Progress
    from swifti2v.settings import GenerationSettings

LOGGER = logging.getLogger(__name__)

STAGE_ONE_PERCENT = 30
"""Progress in percent when Stage I ends: about its share of the time at full size."""

MOTION_PRESET = "ultrafast"  # of x264: the motion reference is small, and for a look only


class PipelineRunner:
    """Runs jobs on one pipeline at a time, which is loaded when the first job asks for it.

    Where the pipeline holds Stage I alone, a video is handed on when its motion reference is made; a preview is whole
    then.

    Args:
        load: makes the pipeline of a model's name.
    """

    def __init__(self, load: Callable[[str], TwoStagePipeline]) -> None:
        self._load = load
        self._loaded: tuple[str, TwoStagePipeline] | None = None

    @classmethod
    def on_device(
        cls,
        device: str | None,
        memory: str | None = None,
        *,
        acceleration: Acceleration | None = None,
        stages: Collection[JobStage] = ALL_STAGES,
        few_step: bool = True,
    ) -> Self:
        """Return a runner of checkpoints, and log how it runs them.

        Args:
            device: as in `TwoStagePipeline.from_pretrained`.
            memory: of the device that a run may take, as `MemoryLimits.parse` reads it.
            acceleration: as in `TwoStagePipeline.from_pretrained`.
            stages: whose networks are loaded.
            few_step: as in `TwoStagePipeline.from_pretrained`; to be the same for the workers of a job's two stages.
        """
        from swifti2v.memory.heap import map_large_blocks
        from swifti2v.memory.limits import MemoryLimits
        from swifti2v.runner.two_stage import TwoStagePipeline

        map_large_blocks()
        limits = None if memory is None else MemoryLimits.parse(memory)
        place, room = device or "the default device", memory or "not limited"
        way = "few steps" if few_step else "many steps"
        LOGGER.info("runs on %s: %s, %s, memory %s, %s", place, " and ".join(stages), way, room, acceleration)
        options: dict[str, Any] = {"device": device, "memory": limits, "acceleration": acceleration}
        options["few_step"] = few_step
        if len(stages) == 1:
            (stage,) = stages
            return cls(lambda name: TwoStagePipeline.of_stage(name, stage.value, **options))
        return cls(lambda name: TwoStagePipeline.from_pretrained(name, **options))

    def run(self, task: Task) -> JobResult | JobStage:
        """Make the video or the preview; a runner of Stage I alone makes the motion reference and hands the job on.

        Raises what the pipeline raises, and `GenerationCancelled` of the task; `DeviceLostError` where a card has
        failed in it.
        """
        try:
            return self._run(task)
        except GenerationCancelled:
            raise
        except Exception as error:
            if not (lost := broken_devices()):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            cards = ", ".join(f"cuda:{index}" for index in lost)
            msg = f"{cards} does not work any more ({said}); a new process may be able to use it"
            raise DeviceLostError(msg) from error

    def _run(self, task: Task) -> JobResult | JobStage:
        asked, files = task.job.request, task.files
        pipeline = self.pipeline(asked.model)
        request = pipeline.request(task.input, asked.prompt, **checked_choices(asked.options))
        settings = request.settings
        make, size = pipeline.stream, settings.size
        known = task.job.progress.percent
        gauge = ProgressGauge("frames" if settings.refiner == "none" else "stage_two", known)
        if asked.preview:
            make, size = pipeline.preview, pipeline.parts.motion_size(settings.size)
            gauge = ProgressGauge("stage_one", known)
        task.report(gauge.current)
        if not asked.preview and "stage_two" not in pipeline.parts.stages:
            _make_motion(pipeline, request, files, lambda progress: task.report(gauge.read(progress)))
            return JobStage.TWO

        def on_progress(progress: Progress) -> None:
            task.report(gauge.read(progress))
            if asked.keep_motion and progress.phase != "stage_one" and not files.motion.exists():
                _write_motion(files, settings.fps)

        with closing(make(request, work_dir=files.work, on_progress=on_progress)) as pieces:
            _write(pieces, size, settings, files)
        return JobResult(
            directory=files.directory.name,
            width=size.width,
            height=size.height,
            num_frames=settings.num_frames,
            fps=settings.fps,
            notes=(*asked.notes, *request.notes),
        )

    def pipeline(self, model: str) -> TwoStagePipeline:
        """Return the pipeline of a model, loading it if another one, or none, is loaded."""
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two at once might not fit into memory
            gc.collect()  # a network that has had hooks is a circle
            self._loaded = (model, self._load(model))
        return self._loaded[1]


class ProgressGauge:
    """Converts the steps of the pipeline to percent of the whole job, which never decrease.

    Args:
        last_phase: whose end is that of the job.
        percent: where an earlier worker left the job.
    """

    def __init__(self, last_phase: Literal["stage_one", "stage_two", "frames"], percent: int = 0) -> None:
        self._last_phase = last_phase
        self._start_percent = 0 if last_phase == "stage_one" else STAGE_ONE_PERCENT
        self.current = JobProgress(percent)

    def read(self, progress: Progress) -> JobProgress:
        """Return where the job is after `progress`."""
        share = progress.done / max(progress.total, 1)
        if progress.phase == self._last_phase:
            percent = self._start_percent + int((100 - self._start_percent) * share)
        elif progress.phase == "stage_one":
            percent = int(STAGE_ONE_PERCENT * share)
        else:
            return self.current  # chunks come between the steps of Stage II, and say nothing new
        percent = max(self.current.percent, min(99, percent))  # 100 is for the finished file
        self.current = JobProgress(percent, progress.phase, progress.segment, progress.num_segments)
        return self.current


def _make_motion(
    pipeline: TwoStagePipeline, request: GenerationRequest, files: AttemptFiles, on_progress: OnProgress
) -> None:
    """Run Stage I into the work folder of a claim."""
    with closing(pipeline.preview(request, work_dir=files.work, on_progress=on_progress)) as pieces:
        for _ in pieces:
            pass


def _write(pieces: Iterable[FinishedFrames], size: Size, settings: GenerationSettings, files: AttemptFiles) -> None:
    """Write the files of the job; the video takes its name last, when the pictures are there."""
    sheet = Spritesheet(settings.num_frames)
    with VideoWriter(files.video, size=size, fps=settings.fps, keep_partial=False) as writer:
        for piece in pieces:
            frames = piece.frames.numpy()
            if piece.first_frame == 0:
                save_thumbnail(frames[0], files.thumbnail)
            sheet.add(frames, first_frame=piece.first_frame)
            writer.write(frames)
        sheet.save(files.spritesheet)


def _write_motion(files: AttemptFiles, fps: float) -> None:
    """Write the motion reference, which Stage I has finished, as a video to be compared with the result."""
    chunks = WorkDirectory(files.work).motion.chunks()
    first = next(chunks)
    size = Size(first.shape[2], first.shape[1])
    with VideoWriter(files.motion, size=size, fps=fps, preset=MOTION_PRESET, keep_partial=False) as writer:
        writer.write(first)
        for frames in chunks:
            writer.write(frames)
