"""Jobs as the browser sees them: plain data, the names of files as addresses. Pure functions over the queue."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swifti2v.errors import SwiftI2VError
from swifti2v.jobs.state import JobState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.state import Job

MEDIA_PATH = "media"
KINDS = ("input", "thumbnail", "video", "motion", "growing")

_MAX_TITLE = 90


def media_file(queue: JobQueue, job_id: str, kind: str) -> Path | None:
    """Return the file of a job, or None if there is none (yet).

    Args:
        queue: of the job.
        job_id: its name.
        kind: one of `KINDS`; `motion` is the motion reference, `growing` the video at work.

    Raises:
        JobError: there is no such job.
    """
    return _file(queue, queue.store.get(job_id), kind)


def _file(queue: JobQueue, job: Job, kind: str) -> Path | None:
    if kind == "input":
        return _existing(queue.files.input(job.id))
    files = queue.result_files(job)
    if files is None:
        return None
    finished = job.state is JobState.COMPLETED
    paths: Mapping[str, Path | None] = {
        "thumbnail": files.thumbnail,
        "video": files.video if finished and not job.request.preview else None,
        "motion": (files.video if finished else None) if job.request.preview else files.motion,
        # Finished before the queue knows it, the video has its name already.
        "growing": None if finished else _playable(files.growing_video) or files.video,
    }
    return _existing(paths.get(kind))


def playable_bytes(path: Path) -> int:
    """Return how many bytes at the start of a growing MP4 are whole boxes, movie fragments with their data."""
    position = playable = 0
    with path.open("rb") as file:
        length = path.stat().st_size
        while position + 8 <= length:
            file.seek(position)
            size = int.from_bytes(file.read(4))
            kind = file.read(4)
            if size < 8 or position + size > length:
                break
            position += size
            if kind in (b"moov", b"mdat"):  # a `moof` without its `mdat` cannot be played
                playable = position
    return playable


def job_view(queue: JobQueue, job: Job, *, now: float | None = None) -> dict[str, Any]:
    """Return everything that the stage shows of a job."""
    media = {kind: _address(job, kind) for kind in KINDS if _file(queue, job, kind) is not None}
    if "growing" in media:
        media["growing"] += f"?segment={job.progress.segment}"  # another address, so that the browser takes it anew
    options = job.request.options
    progress = job.progress
    return {
        "id": job.id,
        "kind": "preview" if job.request.preview else "video",
        "state": job.state.value,
        "headline": headline(queue, job),
        "percent": progress.percent,
        "segment": progress.segment,
        "segments": progress.num_segments,
        "phase": progress.phase,
        "prompt": job.request.prompt,
        "settings": _settings_line(job, options),
        "aspect": " / ".join(map(str, options.get("size") or ())),
        "fps": options.get("fps") or (job.result.fps if job.result is not None else 16.0),
        "seconds": _seconds(job, time.time() if now is None else now),
        "notes": list(job.result.notes) if job.result is not None else [],
        "error": job.failure.message if job.failure is not None else "",
        "media": media,
        "download": f"swifti2v_{job.id[6:14]}.mp4",
    }


def library_view(queue: JobQueue, jobs: Sequence[Job], *, current: str) -> list[dict[str, Any]]:
    """Return the lines of queue and history, the newest first."""
    return [
        {
            "id": job.id,
            "kind": "preview" if job.request.preview else "video",
            "state": job.state.value,
            "headline": headline(queue, job),
            "percent": job.progress.percent,
            "title": _title(job.request.prompt),
            "picture": _address(job, "thumbnail" if _file(queue, job, "thumbnail") else "input"),
            "active": not job.state.is_final,
            "current": job.id == current,
        }
        for job in jobs
    ]


def headline(queue: JobQueue, job: Job) -> str:
    """Return a few words on the state of a job."""
    if job.state is JobState.QUEUED:
        ahead = jobs_ahead(queue, job)
        return "Next in the queue" if ahead == 0 else f"In the queue, {ahead} ahead of it"
    if job.state is JobState.IN_PROGRESS:
        return _work_line(job)
    if job.state is JobState.CANCELLED:
        return "Cancelled" if job.lease_token is None else "Cancelled; the worker stops at its next step"
    if job.state is JobState.FAILED:
        return "Failed"
    return "Motion preview" if job.request.preview else "Video"


def jobs_ahead(queue: JobQueue, job: Job) -> int:
    """Return how many jobs the workers will take before this one, those at work included."""
    active = queue.store.list(order="asc", limit=1000, states=(JobState.QUEUED, JobState.IN_PROGRESS))
    return sum(other.sequence < job.sequence for other in active)


def one_line(error: Exception) -> str:
    """Return what to show of an error: our own messages name the fix, others only say that something is wrong."""
    if isinstance(error, SwiftI2VError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: see the log of the app; try again, or restart it"


def _work_line(job: Job) -> str:
    progress = job.progress
    if progress.num_segments:
        return f"Stage II: segment {progress.segment} of {progress.num_segments}"
    if progress.phase == "frames":
        return "Writing frames"
    return "Stage I: finding the motion" if progress.phase else "Preparing"


def _settings_line(job: Job, options: Mapping[str, Any]) -> str:
    size, frames, seed, steps = (options.get(name) for name in ("size", "num_frames", "seed", "num_inference_steps"))
    shown = [
        job.request.model,
        "x".join(map(str, size)) if size is not None else "",
        f"{frames} frames" if frames is not None else "",
        f"seed {seed}" if seed is not None else "",
        f"{steps} step{'s' * (steps != 1)}" if steps is not None and not job.request.preview else "",
    ]
    return ", ".join(filter(None, shown))


def _seconds(job: Job, now: float) -> float | None:
    if job.started_at is None:
        return None
    return round((job.finished_at or now) - job.started_at, 1)


def _address(job: Job, kind: str) -> str:
    return f"{MEDIA_PATH}/{job.id}/{kind}"


def _title(prompt: str) -> str:
    words = " ".join(prompt.split()) or "(no prompt)"
    return words if len(words) <= _MAX_TITLE else words[: _MAX_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _playable(path: Path) -> Path | None:
    try:
        return path if playable_bytes(path) else None
    except FileNotFoundError:
        return None


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path.is_file() else None
