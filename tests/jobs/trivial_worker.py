"""A worker process whose jobs take five milliseconds; started by `test_chaos.py`, and killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobProgress, JobResult
from swifti2v.jobs.worker import Worker, WorkerOptions

if TYPE_CHECKING:
    from swifti2v.jobs.worker import Task

LEASE_SECONDS = 3.0  # as long as a worker may be kept from its heartbeat on a busy machine


class SleepingRunner:
    """Sleeps, then writes who did which claim of which job."""

    def run(self, task: Task) -> JobResult:
        time.sleep(0.005)
        task.report(JobProgress(50, "stage_two", 1, 1))
        task.files.video.write_text(f"{task.job.id} {task.job.claims}")
        return JobResult(task.files.directory.name)


def work(root: str, url: str | None = None) -> None:
    """Work for ever: the end comes from outside."""
    queue = JobQueue.open(Path(root), url=url)
    options = WorkerOptions(lease_seconds=LEASE_SECONDS, poll_seconds=0.02, retry_seconds=0.1)
    Worker(queue.store, queue.files, SleepingRunner(), options=options).run()
