"""A folder of pictures as jobs: submitted as the queue has room, and their videos collected.

Which job makes the video of which picture is kept beside the videos (``.photo.job``), so that a batch that was stopped
goes on where it was instead of being queued a second time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from swifti2v.errors import InvalidInputError, JobError, OutputError, QueueFullError
from swifti2v.jobs.state import Job, JobRequest, JobState
from swifti2v.media.images import load_image
from swifti2v.settings import plain_choices

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class BatchPicture:
    """A picture and its prompt."""

    path: Path
    prompt: str


def pictures_in(folder: Path, *, prompt: str = "") -> tuple[BatchPicture, ...]:
    """Return the pictures of a folder by name; the prompt of ``photo.jpg`` is in ``photo.txt``, or `prompt`.

    Raises:
        InvalidInputError: there is no such folder or no picture in it, or two pictures would make the same video.
    """
    if not folder.is_dir():
        msg = f"{folder} is no folder; give the one that holds the pictures"
        raise InvalidInputError(msg)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        msg = f"{folder} holds no pictures; use {', '.join(SUFFIXES)}"
        raise InvalidInputError(msg)
    twice = [path for before, path in pairwise(paths) if before.stem == path.stem]
    if twice:
        msg = f"two pictures are called {twice[0].stem}; give them names that differ before the dot"
        raise InvalidInputError(msg)
    return tuple(BatchPicture(path, _prompt_of(path, prompt)) for path in paths)


class Batch:
    """Videos of pictures, in one folder.

    Args:
        queue: whose workers make them.
        output: folder of the videos, made if it is missing.
        model: checkpoint, by the name that the workers have.
        choices: fields of `GenerationSettings`, for every video.
        poll_seconds: pause between two looks at the jobs.
    """

    def __init__(
        self,
        queue: JobQueue,
        output: Path,
        *,
        model: str,
        choices: Mapping[str, Any],
        poll_seconds: float = 1.0,
    ) -> None:
        self._queue = queue
        self._output = output
        self._model = model
        self._options = plain_choices(choices)
        self._poll_seconds = poll_seconds

    def run(self, pictures: Iterable[BatchPicture], *, on_change: Callable[[str], object]) -> tuple[str, ...]:
        """Return the names of the pictures whose videos failed, when all have ended; those that are there are kept.

        Raises:
            ImageInputError: a picture cannot be read.
            OutputError: a video cannot be written.
        """
        try:
            self._output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(self._output, error) from error
        waiting = [picture for picture in pictures if not self._video(picture).exists()]
        running: dict[BatchPicture, str] = {}
        failures = []
        while waiting or running:
            while waiting and (job_id := self._submitted(waiting[0])) is not None:
                running[waiting.pop(0)] = job_id
            for picture, job in self._ended(running):
                del running[picture]
                on_change(f"{picture.path.name}: {job.state.value}")
                if job.state is JobState.COMPLETED:
                    self._collect(picture, job)
                else:
                    failures.append(picture.path.name)
                self._mark(picture).unlink(missing_ok=True)
            if running or waiting:
                time.sleep(self._poll_seconds)
        return tuple(failures)

    def _submitted(self, picture: BatchPicture) -> str | None:
        """Return the job of a picture, an earlier one if it is still known; None while the queue is full."""
        mark = self._mark(picture)
        if mark.exists():
            known = mark.read_text(encoding="utf-8").strip()
            try:
                return self._queue.store.get(known).id
            except JobError:
                mark.unlink()
        loaded = load_image(picture.path)
        request = JobRequest(self._model, picture.prompt, self._options, loaded.notes)
        try:
            job = self._queue.submit(loaded.image, request)
        except QueueFullError:
            return None
        mark.write_text(job.id, encoding="utf-8")
        return job.id

    def _ended(self, running: dict[BatchPicture, str]) -> list[tuple[BatchPicture, Job]]:
        jobs = [(picture, self._queue.store.get(job_id)) for picture, job_id in running.items()]
        return [(picture, job) for picture, job in jobs if job.state.is_final]

    def _collect(self, picture: BatchPicture, job: Job) -> None:
        """Copy the video under a name that holds a whole file or none."""
        files, target = self._queue.result_files(job), self._video(picture)
        partial = target.with_name(f".{target.name}.part")
        try:
            if files is not None:
                shutil.copyfile(files.video, partial)
                partial.replace(target)
        except OSError as error:
            raise _not_written(target, error) from error

    def _video(self, picture: BatchPicture) -> Path:
        return self._output / f"{picture.path.stem}.mp4"

    def _mark(self, picture: BatchPicture) -> Path:
        return self._output / f".{picture.path.stem}.job"


def _prompt_of(path: Path, default: str) -> str:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else default


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written ({error.strerror}); free some space, or choose another --output")
