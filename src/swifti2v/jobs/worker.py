"""A worker: takes jobs one after the other, keeps its claim alive, and stops a job within one denoising step."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, Self

from swifti2v.errors import (
    DeviceLostError,
    GenerationCancelled,
    InvalidInputError,
    OutputError,
    SwiftI2VError,
    WorkDirectoryError,
)
from swifti2v.jobs.state import ALL_STAGES, JobFailure, JobStage

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.files import AttemptFiles, JobFiles
    from swifti2v.jobs.state import Job, JobProgress, JobResult
    from swifti2v.jobs.store import JobStore

LOGGER = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.25
"""Progress is written at most this often; the heartbeat or the next step writes what was left out."""


class Runner(Protocol):
    """What does the work of a job."""

    def run(self, task: Task) -> JobResult | JobStage:
        """Do the job and return its result, or do what can be done here and return the stage that others go on with.

        `GenerationCancelled` of `task.report` is to be let pass. `DeviceLostError` ends the worker.
        """
        ...


class Outcome(Enum):
    """How a claim ended."""

    COMPLETED = "completed"
    HANDED_ON = "handed on"
    FAILED = "failed"
    RETRIED = "retried"
    RELEASED = "released"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a worker.

    Args:
        name: in the records of its jobs; default: host, process and four random digits.
        models: take only jobs of these; None for all.
        stages: take only jobs that go on with one of these; the runner has to be made for the same.
        lease_seconds: a job is given to another worker when nothing was heard of its worker for so long.
        poll_seconds: pause between two looks at an empty queue.
        stall_seconds: a job without any step for so long is given up by its heartbeat.
        retry_seconds: pause before a job that failed through no fault of its own is tried again.
        grace_seconds: how long a job may still run after `drain`, before it is given back.
    """

    name: str = ""
    models: Collection[str] | None = None
    stages: Collection[JobStage] = ALL_STAGES
    lease_seconds: float = 30.0
    poll_seconds: float = 0.5
    stall_seconds: float = 3600.0
    retry_seconds: float = 5.0
    grace_seconds: float = 0.0


class Worker:
    """One worker; several of them may be on one machine or on many.

    Args:
        store: the queue.
        files: of the jobs; workers of one queue share the folder.
        runner: does the work.
        options: see `WorkerOptions`.
    """

    def __init__(
        self, store: JobStore, files: JobFiles, runner: Runner, *, options: WorkerOptions | None = None
    ) -> None:
        self.options = options or WorkerOptions()
        self.name = self.options.name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.store = store
        self.files = files
        self.runner = runner
        self._drain = threading.Event()
        self._drain_deadline = float("inf")

    def drain(self) -> None:
        """Take no more jobs; the one at work is given back at its first step after the grace, to be continued."""
        self._drain_deadline = time.monotonic() + self.options.grace_seconds
        self._drain.set()

    def must_stop_at(self, now: float) -> bool:
        """Whether the job at work is to be given back; `now` by the monotonic clock."""
        return self._drain.is_set() and now >= self._drain_deadline

    def run(self, *, until_idle: bool = False, max_jobs: int | None = None) -> int:
        """Work until `drain`, or until there is no job or enough are done; return how many claims were worked on.

        Raises:
            DeviceLostError: the runner's device works no more; its process should end, and the job is tried again.
        """
        count = 0
        while not self._drain.is_set() and (max_jobs is None or count < max_jobs):
            if self.run_one() is not None:
                count += 1
            elif until_idle:
                break
            else:
                self._drain.wait(self.options.poll_seconds)
        LOGGER.info("%s: worked on %d jobs", self.name, count)
        return count

    def run_one(self) -> Outcome | None:
        """Take one job and work on it to its end; None if there was none, or the database was away."""
        wanted = self.options
        try:
            job = self.store.claim(
                self.name, lease_seconds=wanted.lease_seconds, models=wanted.models, stages=wanted.stages
            )
        except OutputError as error:
            LOGGER.warning("no job could be taken: %s", error)
            return None
        if job is None:
            return None
        with Task(self, job) as task:
            outcome = task.work()
        LOGGER.info("%s: %s by %s, claim %d", job.id, outcome.value, self.name, job.claims)
        return outcome


class Task:
    """One claim of one job: what a runner is given, with the heartbeat beside it.

    Attributes:
        job: the job as it was claimed.
    """

    def __init__(self, worker: Worker, job: Job) -> None:
        self.job = job
        self._worker = worker
        self._store = worker.store
        self._stopped = threading.Event()
        self._lost = threading.Event()
        self._last_step = time.monotonic()
        self._writing = threading.Lock()
        self._written_at = float("-inf")
        self._progress: JobProgress | None = None
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat-{job.id[-6:]}", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._heart.join()

    @property
    def input(self) -> Path:
        """The picture."""
        return self._worker.files.input(self.job.id)

    @property
    def files(self) -> AttemptFiles:
        """Where to write."""
        return self._worker.files.attempt(self.job.id, self.job.claims)

    def report(self, progress: JobProgress) -> None:
        """Say how far the job is; to be called after every denoising step.

        Raises:
            GenerationCancelled: the runner must stop at once: the job was cancelled or taken over, or the worker
                stops.
        """
        now = self._last_step = time.monotonic()
        if self._lost.is_set() or not self._still_held(now, progress):
            self._lost.set()
            msg = f"{self.job.id} was cancelled or taken over"
            raise GenerationCancelled(msg)
        if self._worker.must_stop_at(now):
            msg = f"{self.job.id} is given back: the worker stops"
            raise GenerationCancelled(msg)

    def work(self) -> Outcome:
        """Run the job and record how it ended."""
        files = self._worker.files
        try:
            files.begin_attempt(self.job.id, self.job.claims)
            made = self._worker.runner.run(self)
            if isinstance(made, JobStage):
                return self._handed_on(made)
            completed = self._store.complete(self.job, made)
        except GenerationCancelled:
            return self._stopped_early()
        except (KeyboardInterrupt, SystemExit):
            self._store.release(self.job)
            raise
        except DeviceLostError as error:
            self._failed(error)  # this job is tried again elsewhere; the next ones would only fail here
            raise
        except Exception as error:  # noqa: BLE001 - whatever a job does, its worker lives on
            return self._failed(error)
        if not completed:
            return self._stopped_early()
        # The video of a preview begins with its work.
        files.keep_only(self.job.id, self.job.claims, with_work=self.job.request.preview)
        return Outcome.COMPLETED

    def _still_held(self, now: float, progress: JobProgress) -> bool:
        self._progress = progress
        if now - self._written_at < PROGRESS_SECONDS:
            return self._store.holds(self.job)
        self._written_at = now
        return self._renew()

    def _renew(self) -> bool:
        with self._writing:  # or a heartbeat could write an older progress over a newer one
            return self._store.renew(
                self.job, lease_seconds=self._worker.options.lease_seconds, progress=self._progress
            )

    def _handed_on(self, next_stage: JobStage) -> Outcome:
        """Leave the job to a worker of its next stage, which finds the work of this claim in the folder of the job."""
        if self._store.hand_on(self.job, next_stage, progress=self._progress or self.job.progress):
            return Outcome.HANDED_ON
        return self._stopped_early()

    def _stopped_early(self) -> Outcome:
        """Give the job back, or remove the files of one that is no longer ours."""
        if not self._lost.is_set() and self._store.release(self.job):
            return Outcome.RELEASED
        if self._store.let_go(self.job):
            self._worker.files.clear_attempts(self.job.id)
            return Outcome.CANCELLED
        return Outcome.LOST

    def _failed(self, error: Exception) -> Outcome:
        LOGGER.warning("%s failed: %s", self.job.id, error, exc_info=not isinstance(error, SwiftI2VError))
        # The same input would fail again; anything else (memory, disk, a card) may pass.
        final = isinstance(error, InvalidInputError)
        failure = JobFailure("invalid_input" if final else "internal_error", _one_line(error))
        retry_seconds = None if final else self._worker.options.retry_seconds
        anew = isinstance(error, WorkDirectoryError)
        first = JobStage.ONE if anew else None
        if not self._store.fail(self.job, failure, retry_seconds=retry_seconds, next_stage=first):
            return self._stopped_early()
        if anew:
            self._worker.files.clear_attempts(self.job.id)  # it would be damaged again for the next worker
        if not final and self.job.attempts < self.job.max_attempts:
            return Outcome.RETRIED
        self._worker.files.clear_attempts(self.job.id)
        return Outcome.FAILED

    def _beat(self) -> None:
        options = self._worker.options
        while not self._stopped.wait(options.lease_seconds / 3):
            if time.monotonic() - self._last_step > options.stall_seconds:
                LOGGER.error("%s makes no step; it is left to another worker", self.job.id)
                return
            try:
                if not self._renew():
                    self._lost.set()
                    return
            except OutputError as error:
                LOGGER.warning("%s: no heartbeat: %s", self.job.id, error)


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:500] if lines else type(error).__name__
