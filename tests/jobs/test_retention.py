"""What `prune` removes, and what it must not touch."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import JobError, QueueFullError
from swifti2v.jobs.retention import ORPHAN_SECONDS, Pruned, RetentionPolicy, prune
from swifti2v.jobs.state import JobRequest, JobResult, JobState, new_job_id
from swifti2v.jobs.worker import Worker
from tests.jobs.conftest import StepRunner

if TYPE_CHECKING:
    import PIL.Image

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.worker import Task

KEEP_ALL = RetentionPolicy(max_age_seconds=None, max_bytes=None)


class BytesRunner(StepRunner):
    """Leaves 1000 bytes beside the picture."""

    def run(self, task: Task) -> JobResult:
        task.files.video.write_bytes(b"v" * 1000)
        return JobResult(task.files.directory.name)


@pytest.fixture
def finished(queue: JobQueue, picture: PIL.Image.Image) -> list[str]:
    """Three finished jobs, the oldest first."""
    ids = [queue.submit(picture, JobRequest("tiny")).id for _ in range(3)]
    Worker(queue.store, queue.files, BytesRunner()).run(until_idle=True)
    return ids


def left(queue: JobQueue) -> set[str]:
    records = {job.id for job in queue.store.list(limit=100)}
    assert records == set(queue.files.ids())
    return records


def test_nothing_goes_without_a_reason(queue: JobQueue, finished: list[str]) -> None:
    assert prune(queue, KEEP_ALL) == Pruned(0, 0)
    assert left(queue) == set(finished)


def test_by_age(queue: JobQueue, finished: list[str], picture: PIL.Image.Image) -> None:
    waiting = queue.submit(picture, JobRequest("tiny"))
    policy = RetentionPolicy(max_age_seconds=60)
    assert prune(queue, policy).num_jobs == 0
    assert prune(queue, policy, now=time.time() + 61).num_jobs == 3
    assert left(queue) == {waiting.id}


def test_by_bytes_the_oldest_go(queue: JobQueue, finished: list[str]) -> None:
    one = queue.files.size_bytes(finished[0])
    assert one > 1000
    pruned = prune(queue, RetentionPolicy(max_age_seconds=None, max_bytes=2 * one))
    assert pruned == Pruned(1, one)
    assert left(queue) == set(finished[1:])


def test_active_jobs_are_never_touched(queue: JobQueue, picture: PIL.Image.Image) -> None:
    waiting, running, stopping = (queue.submit(picture, JobRequest("tiny")).id for _ in range(3))
    queue.store.cancel(waiting)
    for _ in range(2):
        assert queue.store.claim("one", lease_seconds=60)
    queue.remove(stopping)
    nothing = RetentionPolicy(max_age_seconds=0.0, max_bytes=0)
    assert prune(queue, nothing, now=time.time() + 30).num_jobs == 1
    assert set(queue.files.ids()) == {running, stopping}
    assert queue.store.get(running).state is JobState.IN_PROGRESS


def test_a_removed_job_goes_when_its_worker_has_stopped(queue: JobQueue, picture: PIL.Image.Image) -> None:
    job_id = queue.submit(picture, JobRequest("tiny")).id
    runner = StepRunner(on_step=lambda task, step: queue.remove(job_id) if step == 1 else None)
    Worker(queue.store, queue.files, runner).run_one()
    assert prune(queue, KEEP_ALL).num_jobs == 1
    assert list(queue.files.ids()) == []
    assert not queue.store.known(job_id)


@pytest.mark.parametrize("finish", [True, False])
def test_removing_is_immediate_where_nobody_works(queue: JobQueue, picture: PIL.Image.Image, finish: bool) -> None:
    job_id = queue.submit(picture, JobRequest("tiny")).id
    if finish:
        Worker(queue.store, queue.files, StepRunner()).run_one()
    queue.remove(job_id)
    assert list(queue.files.ids()) == []
    with pytest.raises(JobError):
        queue.remove(job_id)


def test_files_without_a_job_go_after_a_while(queue: JobQueue, finished: list[str], picture: PIL.Image.Image) -> None:
    stray = new_job_id()
    queue.files.add_input(stray, picture)
    (queue.files.jobs / "notes").mkdir()  # not ours
    assert prune(queue, KEEP_ALL).num_bytes == 0
    old = time.time() - ORPHAN_SECONDS - 1
    for job_id in (stray, finished[0]):
        os.utime(queue.files.directory(job_id), (old, old))
    assert prune(queue, KEEP_ALL).num_bytes > 0
    assert left(queue) == set(finished)
    assert (queue.files.jobs / "notes").is_dir()


def test_a_refused_job_leaves_no_files(queue: JobQueue, picture: PIL.Image.Image) -> None:
    queue.submit(picture, JobRequest("tiny"), owner="ann")
    with pytest.raises(QueueFullError):
        queue.submit(picture, JobRequest("tiny"), owner="ann", max_active_of_owner=1)
    assert len(list(queue.files.ids())) == 1
