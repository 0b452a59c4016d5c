"""A job as a run of the pipeline: the growing video, its thumbnail and its spritesheet."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from swifti2v.config import from_mapping
from swifti2v.jobs.pictures import Spritesheet, save_thumbnail
from swifti2v.jobs.state import JobProgress, JobResult
from swifti2v.media.video_writer import VideoWriter
from swifti2v.pipelines.options import GenerationOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swifti2v.jobs.worker import Task
    from swifti2v.pipelines.two_stage import FinishedFrames, GenerationRequest, Progress, TwoStagePipeline

STAGE_ONE_PERCENT = 30
"""Of a job's percent, those of Stage I: about its share of the time at full size (`docs/design.md`, 8)."""


class PipelineRunner:
    """Runs jobs on one pipeline at a time, which is loaded when the first job asks for it.

    Args:
        load: makes the pipeline of a model's name.
    """

    def __init__(self, load: Callable[[str], TwoStagePipeline]) -> None:
        self._load = load
        self._loaded: tuple[str, TwoStagePipeline] | None = None

    def run(self, task: Task) -> JobResult:
        """Make the video; raise what the pipeline raises, and `GenerationCancelled` of the task."""
        asked = task.job.request
        pipeline = self.pipeline(asked.model)
        options = from_mapping(GenerationOptions, asked.options)
        request = pipeline.request(task.input, asked.prompt, options=options)
        gauge = ProgressGauge(has_stage_two=request.settings.refiner != "none")
        task.report(gauge.current)

        def on_progress(progress: Progress) -> None:
            task.report(gauge.read(progress))

        with closing(pipeline.stream(request, work_dir=task.files.work, on_progress=on_progress)) as pieces:
            _write(pieces, request, task)
        settings = request.settings
        return JobResult(
            directory=task.files.directory.name,
            width=settings.size.width,
            height=settings.size.height,
            num_frames=settings.num_frames,
            fps=settings.fps,
            notes=(*asked.notes, *request.notes, *pipeline.prompt_notes(request)),
        )

    def pipeline(self, model: str) -> TwoStagePipeline:
        """Return the pipeline of a model, loading it if another one, or none, is loaded."""
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two at once might not fit into memory
            self._loaded = (model, self._load(model))
        return self._loaded[1]


class ProgressGauge:
    """From the steps of the pipeline to percent of the whole, which never go back."""

    def __init__(self, *, has_stage_two: bool) -> None:
        self._phase_of_percent = "stage_two" if has_stage_two else "frames"
        self.current = JobProgress()

    def read(self, progress: Progress) -> JobProgress:
        """Return where the job is after `progress`."""
        percent = self.current.percent
        share = progress.done / max(progress.total, 1)
        if progress.phase == "stage_one":
            percent = max(percent, int(STAGE_ONE_PERCENT * share))
        elif progress.phase == self._phase_of_percent:
            # 100 is for the finished file.
            percent = max(percent, min(99, STAGE_ONE_PERCENT + int((100 - STAGE_ONE_PERCENT) * share)))
        if progress.phase == "frames" and self._phase_of_percent != "frames":
            return self.current  # chunks come between the steps of Stage II, and say nothing new
        self.current = JobProgress(percent, progress.phase, progress.segment, progress.num_segments)
        return self.current


def _write(pieces: Iterable[FinishedFrames], request: GenerationRequest, task: Task) -> None:
    """Write the files of the job; the video takes its name last, when the pictures are there."""
    settings, files = request.settings, task.files
    sheet = Spritesheet(settings.num_frames)
    with VideoWriter(files.video, size=settings.size, fps=settings.fps, keep_partial=False) as writer:
        for piece in pieces:
            frames = piece.frames.numpy()
            if piece.first_frame == 0:
                save_thumbnail(frames[0], files.thumbnail)
            sheet.add(frames, first_frame=piece.first_frame)
            writer.write(frames)
        sheet.save(files.spritesheet)
