"""The motion reference in the queue: jobs that stop after Stage I, and videos that begin with what such a job made.

A preview is a job like any other (it waits its turn, is cancelled, survives its worker), whose model is named
``preview:<model>``: a worker takes only jobs of the models that it names, so one that knows no previews leaves them
alone. It keeps its motion reference beside its video; `continue_preview` links that into the work folder of a new
job, where the pipeline finds it and begins with Stage II.

```
jobs/<id>/attempt_0001/
  motion/       what the pipeline keeps of Stage I (previews)
  motion.mp4    the motion reference as a video (videos)
```
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from typing import TYPE_CHECKING

import PIL.Image

from swifti2v.config import from_mapping
from swifti2v.errors import JobError
from swifti2v.geometry import Size
from swifti2v.jobs.pictures import save_thumbnail
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobResult, JobState, new_job_id
from swifti2v.media.frame_store import FrameStore
from swifti2v.media.video_writer import VideoWriter
from swifti2v.pipelines.options import GenerationOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.jobs.files import AttemptFiles
    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.worker import Task
    from swifti2v.pipelines.two_stage import GenerationRequest, Progress, TwoStagePipeline

PREVIEW_PREFIX = "preview:"
MOTION_VIDEO = "motion.mp4"
_MOTION_WORK = "motion"
_STORE = "motion_reference"  # of a work folder (`pipelines/run_store.py`)


def is_preview(request: JobRequest) -> bool:
    """Whether a job stops after Stage I."""
    return request.model.startswith(PREVIEW_PREFIX)


def model_of(request: JobRequest) -> str:
    """Return the name of the checkpoint that a job of either kind asks for."""
    return request.model.removeprefix(PREVIEW_PREFIX)


def motion_video(files: AttemptFiles) -> Path:
    """Return where the motion reference of a video is kept, if the worker was one of the app."""
    return files.directory / MOTION_VIDEO


def continue_preview(queue: JobQueue, preview: Job, request: JobRequest) -> Job:
    """Queue the video of a finished preview; it begins with the motion reference that is already there.

    Args:
        queue: that holds both.
        preview: a completed one.
        request: of the video; what decides Stage I must be as in the preview, or the video fails and says so.

    Raises:
        JobError: the preview is not completed, or its files are gone.
        QueueFullError: as in `JobQueue.submit`.
        OutputError: a file cannot be written.
    """
    files = queue.result_files(preview)
    if preview.state is not JobState.COMPLETED or files is None:
        msg = "this preview is not finished; wait for it, or make the video without a preview"
        raise JobError(msg)
    job_id = new_job_id()
    try:
        with PIL.Image.open(queue.files.input(preview.id)) as image:
            queue.files.add_input(job_id, image.convert("RGB"))
        _link_folder(files.directory / _MOTION_WORK, queue.files.attempt(job_id, 0).work)
        return queue.store.submit(job_id, request, owner=preview.owner)
    except BaseException as error:
        queue.files.remove(job_id)
        if isinstance(error, FileNotFoundError):
            msg = "the files of this preview are gone; make the preview again"
            raise JobError(msg) from error
        raise


class AppRunner:
    """Runs previews and videos, and keeps the motion reference of both as a video.

    Args:
        load: makes the pipeline of a model's name.
    """

    def __init__(self, load: Callable[[str], TwoStagePipeline]) -> None:
        self._videos = PipelineRunner(load)

    def run(self, task: Task) -> JobResult:
        """Do a job of either kind; raise what the pipeline raises, and `GenerationCancelled` of the task."""
        asked = task.job.request
        if is_preview(asked):
            return self._preview(task)
        defaults = self._videos.pipeline(asked.model).defaults
        fps = defaults.settled(from_mapping(GenerationOptions, asked.options)).fps
        return self._videos.run(_TaskKeepingMotion(task, fps))

    def load(self, model: str) -> None:
        """Load a model before the first job asks for it."""
        self._videos.pipeline(model)

    def _preview(self, task: Task) -> JobResult:
        asked = task.job.request
        pipeline = self._videos.pipeline(model_of(asked))
        options = from_mapping(GenerationOptions, asked.options)
        request = pipeline.request(task.input, asked.prompt, options=options)
        task.report(JobProgress())

        def on_progress(progress: Progress) -> None:
            percent = min(99, 100 * progress.done // max(progress.total, 1))
            task.report(JobProgress(percent, progress.phase))

        work = task.files.directory / _MOTION_WORK
        size = _write_preview(pipeline, request, work, task.files, on_progress)
        settings = request.settings
        return JobResult(
            directory=task.files.directory.name,
            width=size.width,
            height=size.height,
            num_frames=settings.num_frames,
            fps=settings.fps,
            notes=(*asked.notes, *request.notes, *pipeline.prompt_notes(request)),
        )


class _TaskKeepingMotion:
    """A task that writes the motion reference down as a video as soon as Stage I has finished it."""

    def __init__(self, task: Task, fps: float) -> None:
        self._task = task
        self._fps = fps
        self._is_kept = False

    @property
    def job(self) -> Job:
        return self._task.job

    @property
    def input(self) -> Path:
        return self._task.input

    @property
    def files(self) -> AttemptFiles:
        return self._task.files

    def report(self, progress: JobProgress) -> None:
        self._task.report(progress)
        if not self._is_kept and progress.phase != "stage_one":
            self._is_kept = self._keep()

    def _keep(self) -> bool:
        store = self.files.work / _STORE
        if not store.is_dir():
            return False
        frames = FrameStore(store)
        if not frames.is_complete or frames.frame_shape is None:
            return False
        height, width = frames.frame_shape[:2]
        target = motion_video(self.files)
        with VideoWriter(target, size=Size(width, height), fps=self._fps, keep_partial=False) as writer:
            for chunk in frames.chunks():
                writer.write(chunk)
        return True


def _write_preview(
    pipeline: TwoStagePipeline,
    request: GenerationRequest,
    work: Path,
    files: AttemptFiles,
    on_progress: Callable[[Progress], None],
) -> Size:
    size = pipeline.parts.motion_size(request.settings.size)
    with (
        closing(pipeline.preview(request, work_dir=work, on_progress=on_progress)) as pieces,
        VideoWriter(files.video, size=size, fps=request.settings.fps, keep_partial=False) as writer,
    ):
        for piece in pieces:
            frames = piece.frames.numpy()
            if piece.first_frame == 0:
                save_thumbnail(frames[0], files.thumbnail)
            writer.write(frames)
    return size


def _link_folder(source: Path, target: Path) -> None:
    """Link a folder's files, which are never written again, so that they outlive the job that made them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # a file system without hard links
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link)
