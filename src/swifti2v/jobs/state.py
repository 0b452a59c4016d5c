"""Jobs as values, and which state may follow which. Pure Python.

```
queued --> in_progress --> completed | failed | cancelled
  |  ^         |
  |  +---------+   released by its worker, to be tried again, or handed on to a worker of the next stage
  +--> cancelled
```
A job whose worker died stays `in_progress` until its lease has run out; another worker may then claim it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_MAX_ATTEMPTS = 3

_ID_PREFIX = "video_"
_ID = re.compile(rf"{_ID_PREFIX}[0-9a-f]{{32}}")


class JobState(StrEnum):
    """Where a job is; the values are those of the HTTP service and the database."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether no other state can follow."""
        return not FOLLOWERS[self]


FOLLOWERS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.IN_PROGRESS, JobState.CANCELLED}),
    JobState.IN_PROGRESS: frozenset(
        {JobState.IN_PROGRESS, JobState.QUEUED, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""States that may follow a state. `in_progress` follows itself when another worker takes over."""

FINAL_STATES = tuple(state for state in JobState if state.is_final)
ACTIVE_STATES = tuple(state for state in JobState if not state.is_final)


class JobStage(StrEnum):
    """A part of the work that a worker can do alone; the values are those of the database."""

    ONE = "stage_one"
    TWO = "stage_two"


ALL_STAGES = tuple(JobStage)


@dataclass(frozen=True)
class JobRequest:
    """What is to be made.

    Args:
        model: name of a checkpoint, as workers announce theirs.
        prompt: what should move, and how.
        options: fields of `GenerationSettings` as plain data (`swifti2v.settings.plain_choices`); None leaves one open.
        notes: what was done to the picture when it was taken in ("rotated by its EXIF orientation").
        preview: stop after Stage I: the motion reference is the video that is made. `JobQueue.continue_preview` makes
            the whole video of it.
        keep_motion: write the motion reference beside the video, to be compared with it.
    """

    model: str
    prompt: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preview: bool = False
    keep_motion: bool = False


@dataclass(frozen=True)
class JobProgress:
    """How far a job is.

    Args:
        percent: of the whole, 0 to 100.
        phase: `stage_one`, `stage_two` or `frames`; empty before the first step.
        segment: the one at work, from 1 to `num_segments`; 0 outside of Stage II.
        num_segments: of Stage II.
    """

    percent: int = 0
    phase: str = ""
    segment: int = 0
    num_segments: int = 0


@dataclass(frozen=True)
class JobResult:
    """What a job made.

    Args:
        directory: of the result's files, a name that the server chose, below the folder of the job.
        width, height, num_frames, fps: of the video.
        notes: what was done to image and prompt on the way.
    """

    directory: str
    width: int = 0
    height: int = 0
    num_frames: int = 0
    fps: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: a `code` for programs (`invalid_input`, `worker_lost`, ...) and one line for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """One job as the store knows it. Times are seconds since 1970.

    Args:
        id: `video_` and 32 hexadecimal digits, drawn at random.
        sequence: number in the order of submission.
        owner: who submitted it; empty on a machine of one user.
        state: see `JobState`.
        request: what is to be made.
        progress: how far it is.
        claims: how often a worker has taken it.
        attempts: those claims that count: not the ones that a worker gave back in good order.
        max_attempts: after so many it fails.
        created_at, started_at, finished_at: of submission, the first claim and the final state.
        worker: name of the worker that has, or had, it.
        lease_token: secret of the current claim; None while no worker has the job.
        lease_expires_at: until when the claim holds.
        result: of a completed job.
        failure: of a failed job.
        next_stage: what a worker has to begin with. It is `TWO` once a worker of Stage I alone has done its part, or
            where a preview left Stage I's work; one that does both stages may be further than this says.
    """

    id: str
    sequence: int
    owner: str
    state: JobState
    request: JobRequest
    progress: JobProgress
    claims: int
    attempts: int
    max_attempts: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    worker: str | None = None
    lease_token: str | None = None
    lease_expires_at: float | None = None
    result: JobResult | None = None
    failure: JobFailure | None = None
    next_stage: JobStage = JobStage.ONE


def new_job_id() -> str:
    """Return a name that cannot be guessed."""
    return _ID_PREFIX + secrets.token_hex(16)


def is_job_id(text: str) -> bool:
    """Whether `text` has the form of a job's name: only such text may become part of a path."""
    return _ID.fullmatch(text) is not None
