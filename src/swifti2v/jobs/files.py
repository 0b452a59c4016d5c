"""The files of jobs. Every name is one that the server chose; nothing a user wrote becomes part of a path.

```
<root>/jobs/<id>/
  input.png         the picture, decoded and written anew
  attempt_0001/     a folder for each claim, so that a worker that was given up for dead cannot disturb its successor
    work/           what the pipeline keeps to resume (`pipelines/run_store.py`); of a preview it stays
    .video.part.mp4 the growing video, fragmented
    motion.mp4      the motion reference, once Stage I has made it, if it is to be kept; of a preview it is `video.mp4`
    video.mp4, thumbnail.jpg, spritesheet.jpg
```
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from swifti2v.errors import JobError, OutputError
from swifti2v.jobs.state import is_job_id
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    import PIL.Image

_ATTEMPT = re.compile(r"attempt_(\d{4,})")
_FAST_COMPRESSION = 1  # of PNG: the picture is read once


@dataclass(frozen=True)
class AttemptFiles:
    """The files of one claim of a job; see the module for what they hold."""

    directory: Path

    @property
    def work(self) -> Path:
        """What the pipeline keeps in order to resume."""
        return self.directory / "work"

    @property
    def video(self) -> Path:
        """The finished video."""
        return self.directory / "video.mp4"

    @property
    def growing_video(self) -> Path:
        """The video while it is made (`VideoWriter.part_path`)."""
        return self.directory / ".video.part.mp4"

    @property
    def motion(self) -> Path:
        """The motion reference as a video."""
        return self.directory / "motion.mp4"

    @property
    def thumbnail(self) -> Path:
        """The first frame, small."""
        return self.directory / "thumbnail.jpg"

    @property
    def spritesheet(self) -> Path:
        """Frames from all over the video in one picture."""
        return self.directory / "spritesheet.jpg"


class JobFiles:
    """The folder of all jobs, made if it is missing.

    Raises:
        OutputError: it cannot be made; from the methods, a file cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = root / "jobs"
        make_folder(self.jobs)

    def directory(self, job_id: str) -> Path:
        """Return the folder of a job; raise `JobError` for a name that is not one of ours."""
        if not is_job_id(job_id):
            msg = f"{job_id[:60]!r} is not the name of a job; list the jobs to see which there are"
            raise JobError(msg)
        return self.jobs / job_id

    def input(self, job_id: str) -> Path:
        """Return where the picture of a job is."""
        return self.directory(job_id) / "input.png"

    def add_input(self, job_id: str, image: PIL.Image.Image) -> None:
        """Write the picture of a new job, under a name that holds a whole file or none."""
        make_folder(self.directory(job_id))

        def save(file: BinaryIO) -> None:
            image.save(file, format="PNG", compress_level=_FAST_COMPRESSION)

        write_atomically(self.input(job_id), save)

    def attempt(self, job_id: str, claim: int) -> AttemptFiles:
        """Return the files of the claim numbered `claim`, from 1."""
        return AttemptFiles(self.directory(job_id) / f"attempt_{claim:04d}")

    def begin_attempt(self, job_id: str, claim: int) -> AttemptFiles:
        """Make the folder of a claim, with the finished work of those before it as hard links.

        A worker that still writes into the old folder, because it was given up too early, replaces names there and
        touches no file here: finished files are never written again, only unfinished ones, and those are left out.
        """
        new = self.attempt(job_id, claim)
        with _reporting(new.directory):
            new.directory.mkdir(parents=True, exist_ok=True)
            # The claim just before may have ended before it had the work of those ahead of it.
            done = [attempt.work for attempt in self._attempts(job_id, before=claim) if attempt.work.is_dir()]
            if done and not new.work.exists():
                _link_tree(done[-1], new.work)
        return new

    def begin_with(self, job_id: str, source_id: str, source: AttemptFiles) -> AttemptFiles:
        """Give a new job the picture of the job `source_id` and the work of its claim, as hard links; return these.

        Raises:
            JobError: they are gone.
        """
        target, picture = self.attempt(job_id, 0), self.input(source_id)
        if not (picture.is_file() and source.work.is_dir()):
            msg = f"the files of {source_id} are gone; make the preview again"
            raise JobError(msg)
        with _reporting(target.directory):
            target.directory.mkdir(parents=True)
            _link(str(picture), str(self.input(job_id)))
            _link_tree(source.work, target.work)
        return target

    def keep_only(self, job_id: str, claim: int, *, with_work: bool = False) -> None:
        """Remove what a finished job no longer needs: other claims, and the work folder of this one if not kept."""
        kept = self.attempt(job_id, claim)
        for attempt in self._attempts(job_id):
            if attempt != kept:
                shutil.rmtree(attempt.directory, ignore_errors=True)
            elif not with_work:
                shutil.rmtree(attempt.work, ignore_errors=True)

    def clear_attempts(self, job_id: str) -> None:
        """Remove all that workers wrote, of a job that failed or was cancelled."""
        for attempt in self._attempts(job_id):
            shutil.rmtree(attempt.directory, ignore_errors=True)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self.directory(job_id), ignore_errors=True)

    def size_bytes(self, job_id: str) -> int:
        """Return what the files of a job take on the disk."""
        total = 0
        for path in self.directory(job_id).rglob("*"):
            with suppress(OSError):  # it may go while we look
                total += path.stat().st_size if path.is_file() else 0
        return total

    def ids(self) -> Iterator[str]:
        """Yield the names of the jobs that have files."""
        with os.scandir(self.jobs) as entries:
            yield from (entry.name for entry in entries if is_job_id(entry.name))

    def _attempts(self, job_id: str, *, before: int | None = None) -> list[AttemptFiles]:
        found = []
        for path in self.directory(job_id).glob("attempt_*"):
            match = _ATTEMPT.fullmatch(path.name)
            if match and (before is None or int(match[1]) < before):
                found.append((int(match[1]), AttemptFiles(path)))
        return [files for _, files in sorted(found, key=lambda item: item[0])]


def _link_tree(source: Path, target: Path) -> None:
    """Link the finished files of `source` into `target`, which appears whole or not at all."""
    if not source.is_dir():
        return
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)

    def ignored(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(".") or name.endswith(".unfinished")]

    shutil.copytree(source, partial, copy_function=_link, ignore=ignored)
    partial.replace(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"{path} cannot be written ({error.strerror or error}); free some space, or choose another data folder"
        raise OutputError(msg) from error
