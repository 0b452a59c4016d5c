"""Workers: claims kept alive, cancel within one step, giving back, and what happens to jobs that fail."""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from swifti2v.errors import DeviceLostError, ImageInputError, OutputError, WorkDirectoryError
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobResult, JobState
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from tests.jobs.conftest import StepRunner, wait_for

if TYPE_CHECKING:
    import PIL.Image

    from swifti2v.jobs.queue import JobQueue

QUICK = WorkerOptions(lease_seconds=0.6, poll_seconds=0.01, retry_seconds=0.0)


def worker_of(queue: JobQueue, runner: Any, **changes: Any) -> Worker:
    options = WorkerOptions(**{**QUICK.__dict__, **changes})
    return Worker(queue.store, queue.files, runner, options=options)


def test_a_job_is_done(queue: JobQueue, job: Job) -> None:
    runner = StepRunner()
    assert worker_of(queue, runner).run(until_idle=True) == 1
    done = queue.store.get(job.id)
    assert (done.state, done.attempts, done.result) == (
        JobState.COMPLETED,
        1,
        JobResult("attempt_0001", 64, 32, 9, 8.0, ("done",)),
    )
    files = queue.result_files(done)
    assert files is not None
    assert json.loads(files.video.read_bytes()) == [job.id, 1]


def test_progress_is_seen_from_outside(queue: JobQueue, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", 0.0)
    seen = []

    def look(task: Task, step: int) -> None:
        seen.append(queue.store.get(job.id).progress)

    worker_of(queue, StepRunner(num_steps=3, on_step=look)).run_one()
    assert seen == [JobProgress(), JobProgress(33, "stage_two", 1, 3), JobProgress(66, "stage_two", 2, 3)]


def test_quick_steps_are_not_all_written_down_but_each_asks(
    queue: JobQueue, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", float("inf"))
    renew, holds = queue.store.renew, queue.store.holds
    calls: list[str] = []
    monkeypatch.setattr(queue.store, "renew", lambda *a, **o: calls.append("write") or renew(*a, **o))
    monkeypatch.setattr(queue.store, "holds", lambda *a: calls.append("ask") or holds(*a))
    worker_of(queue, StepRunner(num_steps=4), lease_seconds=60).run_one()
    assert calls == ["write", "ask", "ask", "ask"]


def test_the_heartbeat_writes_down_what_the_steps_left_out(
    queue: JobQueue, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", float("inf"))

    def long_third_step(task: Task, step: int) -> None:
        if step == 2:
            wait_for(lambda: queue.store.get(job.id).progress.segment == 2)

    assert worker_of(queue, StepRunner(num_steps=3, on_step=long_third_step)).run_one() is Outcome.COMPLETED


def test_a_cancelled_job_stops_within_a_step(queue: JobQueue, job: Job) -> None:
    steps = []

    def cancel_in_the_second(task: Task, step: int) -> None:
        steps.append(step)
        if step == 1:
            queue.store.cancel(job.id)

    assert worker_of(queue, StepRunner(num_steps=50, on_step=cancel_in_the_second)).run_one() is Outcome.CANCELLED
    assert steps == [0, 1]
    assert queue.store.get(job.id).state is JobState.CANCELLED
    assert [path.name for path in queue.files.directory(job.id).iterdir()] == ["input.png"]


def test_the_claim_is_kept_alive_through_a_long_step(queue: JobQueue, job: Job) -> None:
    def long_step(task: Task, step: int) -> None:
        def expiries() -> int:
            seen.add(queue.store.get(job.id).lease_expires_at)
            return len(seen)

        seen: set[float | None] = set()
        wait_for(lambda: expiries() == 3)  # that of the claim, and of two heartbeats

    assert worker_of(queue, StepRunner(num_steps=1, on_step=long_step)).run_one() is Outcome.COMPLETED


def test_a_job_without_any_step_goes_to_another_worker(queue: JobQueue, job: Job) -> None:
    taken: list[Job] = []

    def hang(task: Task, step: int) -> None:
        def take() -> bool:
            taken.extend(filter(None, [queue.store.claim("other", lease_seconds=60)]))
            return bool(taken)

        wait_for(take)

    worker = worker_of(queue, StepRunner(num_steps=1, on_step=hang), lease_seconds=0.3, stall_seconds=0.2)
    assert worker.run_one() is Outcome.LOST
    assert queue.store.holds(taken[0])


def test_a_late_result_is_thrown_away(queue: JobQueue, job: Job) -> None:
    """The first worker sleeps through its lease (stopped, not dead); the second finishes; the first wakes up."""

    class Sleeper(StepRunner):
        def run(self, task: Task) -> JobResult:
            result = super().run(task)
            queue.store.renew(task.job, lease_seconds=-1)
            assert worker_of(queue, StepRunner()).run_one() is Outcome.COMPLETED
            return result

    assert worker_of(queue, Sleeper(), lease_seconds=60).run_one() is Outcome.LOST
    done = queue.store.get(job.id)
    files = queue.result_files(done)
    assert done.result is not None
    assert done.result.directory == "attempt_0002"
    assert files is not None
    assert json.loads(files.video.read_bytes()) == [job.id, 2]


def test_bad_input_fails_at_once(queue: JobQueue, job: Job) -> None:
    def refuse(task: Task, step: int) -> None:
        msg = "the picture is no picture\nand more"
        raise ImageInputError(msg)

    assert worker_of(queue, StepRunner(on_step=refuse)).run_one() is Outcome.FAILED
    failed = queue.store.get(job.id)
    assert failed.failure is not None
    assert (failed.attempts, failed.failure.code, failed.failure.message) == (
        1,
        "invalid_input",
        "the picture is no picture",
    )


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OutputError("disk full"), MemoryError()])
def test_other_failures_are_tried_again(queue: JobQueue, job: Job, error: Exception) -> None:
    def fail_at_first(task: Task, step: int) -> None:
        if task.job.claims == 1:
            raise error

    worker = worker_of(queue, StepRunner(on_step=fail_at_first))
    assert [worker.run_one() for _ in range(3)] == [Outcome.RETRIED, Outcome.COMPLETED, None]


def test_a_worker_whose_card_has_failed_takes_no_other_job(queue: JobQueue, job: Job, picture: PIL.Image.Image) -> None:
    """Every job would fail there; this one is tried again, by a process that can use a card."""
    waiting = queue.submit(picture, JobRequest("tiny"))

    def fail(task: Task, step: int) -> None:
        raise DeviceLostError("cuda:0 does not work any more")

    runner = StepRunner(on_step=fail)
    with pytest.raises(DeviceLostError):
        worker_of(queue, runner).run(until_idle=True)
    assert runner.started == [job.id]
    assert (queue.store.get(job.id).state, queue.store.get(job.id).attempts) == (JobState.QUEUED, 1)
    assert queue.store.get(waiting.id).attempts == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]
    assert worker_of(queue, StepRunner()).run(until_idle=True) == 2


def test_and_not_for_ever(queue: JobQueue, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    def fail(task: Task, step: int) -> None:
        msg = "it broke"
        raise RuntimeError(msg)

    worker = worker_of(queue, StepRunner(on_step=fail))
    with caplog.at_level(logging.WARNING):
        outcomes = [worker.run_one() for _ in range(4)]
    assert outcomes == [Outcome.RETRIED, Outcome.RETRIED, Outcome.FAILED, None]
    assert sum("it broke" in record.message for record in caplog.records) == 3
    failure = queue.store.get(job.id).failure
    assert failure is not None
    assert (failure.code, failure.message) == ("internal_error", "it broke")


def test_damaged_work_is_not_handed_on(queue: JobQueue, job: Job) -> None:
    def damaged_at_first(task: Task, step: int) -> None:
        if task.job.claims == 1:
            task.files.work.mkdir()
            (task.files.work / "segment").touch()
            msg = "damaged"
            raise WorkDirectoryError(msg)
        assert not task.files.work.exists()

    worker = worker_of(queue, StepRunner(on_step=damaged_at_first))
    assert [worker.run_one() for _ in range(2)] == [Outcome.RETRIED, Outcome.COMPLETED]


def test_draining_gives_the_job_back(queue: JobQueue, job: Job, picture: PIL.Image.Image) -> None:
    waiting = queue.submit(picture, JobRequest("tiny"))
    runner = StepRunner(num_steps=50, on_step=lambda task, step: worker.drain() if step == 3 else None)
    worker = worker_of(queue, runner)
    assert worker.run() == 1
    assert runner.started == [job.id]
    assert {queue.store.get(name).state for name in (job.id, waiting.id)} == {JobState.QUEUED}
    assert queue.store.get(job.id).attempts == 0
    assert worker_of(queue, StepRunner()).run(until_idle=True) == 2


def test_draining_with_grace_finishes_the_job(queue: JobQueue, job: Job) -> None:
    runner = StepRunner(num_steps=5, on_step=lambda task, step: worker.drain() if step == 0 else None)
    worker = worker_of(queue, runner, grace_seconds=30.0)
    assert worker.run() == 1
    assert queue.store.get(job.id).state is JobState.COMPLETED


def test_an_interrupt_gives_the_job_back(queue: JobQueue, job: Job) -> None:
    def interrupt(task: Task, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker_of(queue, StepRunner(on_step=interrupt)).run_one()
    assert queue.store.get(job.id).state is JobState.QUEUED
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


def test_a_database_that_is_away_does_not_end_the_worker(
    queue: JobQueue, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, failures = queue.store.claim, iter([True, False])

    def sometimes(*arguments: Any, **options: Any) -> Job | None:
        if next(failures, False):
            msg = "the job database fails"
            raise OutputError(msg)
        return claim(*arguments, **options)

    monkeypatch.setattr(queue.store, "claim", sometimes)
    assert worker_of(queue, StepRunner()).run(max_jobs=1) == 1
    assert queue.store.get(job.id).state is JobState.COMPLETED
