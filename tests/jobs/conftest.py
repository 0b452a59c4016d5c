"""Queues on disk, clocks that the test winds, and runners that do next to nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest

from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import Job, JobFailure, JobProgress, JobRequest, JobResult, new_job_id
from swifti2v.jobs.store import JobStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from swifti2v.jobs.worker import Task
    from swifti2v.runner.two_stage import TwoStagePipeline

LEASE_SECONDS = 10.0
BROKEN = JobFailure("internal_error", "it broke")


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class StepRunner:
    """Reports so many steps, calling `on_step` before each, then writes a result that names its claim."""

    num_steps: int = 3
    on_step: Callable[[Task, int], None] = lambda task, step: None
    started: list[str] = field(default_factory=list)

    def run(self, task: Task) -> JobResult:
        self.started.append(task.job.id)
        for step in range(self.num_steps):
            self.on_step(task, step)
            task.report(JobProgress(100 * (step + 1) // self.num_steps, "stage_two", step + 1, self.num_steps))
        task.files.video.write_bytes(json.dumps([task.job.id, task.job.claims]).encode())
        return JobResult(task.files.directory.name, 64, 32, 9, 8.0, ("done",))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    database = Database(sqlite_url(tmp_path / "queue.db"))
    yield JobStore(database, max_active=50, clock=clock)
    database.close()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue on the real clock."""
    queue = JobQueue.open(tmp_path / "data", max_active=50)
    yield queue
    queue.store.database.close()


@pytest.fixture
def picture() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 4), (200, 100, 50))


@pytest.fixture
def job(queue: JobQueue, picture: PIL.Image.Image) -> Job:
    """A job of the model `tiny` that nobody has claimed."""
    return queue.submit(picture, JobRequest("tiny", "pan"))


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> TwoStagePipeline:
    """The tiny checkpoint as it is loaded, for jobs that are really run."""
    from swifti2v.runner.two_stage import TwoStagePipeline

    return TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def request_of() -> Callable[..., JobRequest]:
    return lambda prompt="", **options: JobRequest("tiny", prompt, options)


def submit(store: JobStore, *, owner: str = "", model: str = "tiny", **options: Any) -> Job:
    return store.submit(new_job_id(), JobRequest(model, "a prompt"), owner=owner, **options)


def claim(store: JobStore, worker: str = "one", **options: Any) -> Job:
    job = store.claim(worker, lease_seconds=LEASE_SECONDS, **options)
    assert job is not None
    return job


def wait_for(condition: Callable[[], bool], *, seconds: float = 300.0, pause_seconds: float = 0.005) -> None:
    """Return when `condition` holds; the limit is patience with a busy machine, and ends a test that is wrong."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause_seconds)
