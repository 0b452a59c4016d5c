"""Workers of one stage: which jobs they take, what they hand on, and what is left when one of them dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from swifti2v.errors import WorkDirectoryError
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import ALL_STAGES, Job, JobProgress, JobResult, JobStage, JobState
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from swifti2v.runner.two_stage import TwoStagePipeline
from tests.jobs.conftest import (
    BROKEN,
    LEASE_SECONDS,
    Reporting,
    StepRunner,
    claim,
    files_of,
    submit,
    submit_real,
    wait_for,
)
from tests.jobs.test_chaos import AUDIT

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.store import JobStore
    from tests.jobs.conftest import Clock

ONE, TWO = JobStage.ONE, JobStage.TWO
HALF = JobProgress(30, "stage_one")
MINI = {"size": "64x32", "num_frames": 41, "num_inference_steps": 4, "stage_one_steps": None, "seed": 1}


# ------------------------------------------------------------------------------------------------------- the store


def test_a_claim_is_for_the_stages_of_its_worker(store: JobStore) -> None:
    first, second = submit(store), submit(store)
    assert store.claim("two", lease_seconds=LEASE_SECONDS, stages=(TWO,)) is None
    taken = claim(store, stages=(ONE,))
    assert (taken.id, taken.next_stage) == (first.id, ONE)
    assert store.hand_on(taken, TWO, progress=HALF)
    waiting = store.get(first.id)
    assert (waiting.state, waiting.next_stage, waiting.progress) == (JobState.QUEUED, TWO, HALF)
    assert (waiting.claims, waiting.attempts, waiting.lease_token) == (1, 0, None)
    assert claim(store, stages=(ONE,)).id == second.id
    assert store.claim("one", lease_seconds=LEASE_SECONDS, stages=(ONE,)) is None
    again = claim(store, stages=(TWO,))
    assert (again.id, again.claims, again.attempts, again.progress) == (first.id, 2, 1, HALF)


def test_a_job_that_is_handed_on_keeps_its_place(store: JobStore) -> None:
    ids = [submit(store).id for _ in range(2)]
    assert store.hand_on(claim(store, stages=(ONE,)), TWO, progress=HALF)
    assert [claim(store, stages=ALL_STAGES).id for _ in range(2)] == ids


def test_jobs_are_counted_by_their_next_stage(store: JobStore) -> None:
    jobs = [submit(store) for _ in range(4)]
    store.hand_on(claim(store), TWO, progress=HALF)
    claim(store, stages=(TWO,))
    store.cancel(jobs[3].id)
    assert [store.num_active(stages) for stages in ((ONE,), (TWO,), ALL_STAGES)] == [2, 1, 3]


def test_a_dead_worker_is_succeeded_by_one_of_the_same_stage(store: JobStore, clock: Clock) -> None:
    job = submit(store)
    claim(store, stages=(ONE,))
    clock.advance(LEASE_SECONDS + 1)
    assert store.claim("two", lease_seconds=LEASE_SECONDS, stages=(TWO,)) is None
    second = claim(store, stages=(ONE,))
    assert store.hand_on(second, TWO, progress=HALF)
    claim(store, stages=(TWO,))
    clock.advance(LEASE_SECONDS + 1)
    assert store.claim("one", lease_seconds=LEASE_SECONDS, stages=(ONE,)) is None
    last = claim(store, stages=(TWO,))
    assert (last.id, last.claims, last.attempts) == (job.id, 4, 3), "the death of each counts, handing on does not"


def test_who_has_lost_a_job_hands_nothing_on(store: JobStore, clock: Clock) -> None:
    submit(store)
    lost = claim(store, "one", stages=(ONE,))
    clock.advance(LEASE_SECONDS + 1)
    held = claim(store, "other", stages=(ONE,))
    assert not store.hand_on(lost, TWO, progress=HALF)
    assert store.hand_on(held, TWO, progress=HALF)
    assert not store.hand_on(held, TWO, progress=HALF), "once"
    cancelled = claim(store, stages=(TWO,))
    store.cancel(cancelled.id)
    assert not store.hand_on(cancelled, ONE, progress=HALF)
    assert store.get(cancelled.id).state is JobState.CANCELLED


def test_a_failure_goes_on_with_the_same_stage_unless_said_otherwise(store: JobStore) -> None:
    submit(store)
    store.hand_on(claim(store), TWO, progress=HALF)
    assert store.fail(claim(store, stages=(TWO,)), BROKEN, retry_seconds=0)
    assert store.fail(claim(store, stages=(TWO,)), BROKEN, retry_seconds=0, next_stage=ONE)
    assert store.claim("two", lease_seconds=LEASE_SECONDS, stages=(TWO,)) is None
    assert claim(store, stages=(ONE,)).attempts == 3


# ------------------------------------------------------------------------------------------------------ the worker


class FirstHalf(StepRunner):
    """Leaves a file in the work of its claim, and hands the job on."""

    def run(self, task: Task) -> Any:
        task.report(HALF)
        task.files.work.mkdir()
        (task.files.work / "motion").write_text(task.job.id)
        return TWO


class SecondHalf(StepRunner):
    """Refuses to work without that file."""

    def run(self, task: Task) -> JobResult:
        if not (task.files.work / "motion").is_file():
            msg = "there is no motion"
            raise WorkDirectoryError(msg)
        return super().run(task)


def worker_of(queue: JobQueue, runner: Any, *stages: JobStage) -> Worker:
    options = WorkerOptions(stages=stages or ALL_STAGES, poll_seconds=0.01, retry_seconds=0.0)
    return Worker(queue.store, queue.files, runner, options=options)


def test_one_worker_begins_and_the_other_goes_on(queue: JobQueue, job: Job) -> None:
    one, two = worker_of(queue, FirstHalf(), ONE), worker_of(queue, SecondHalf(), TWO)
    assert two.run_one() is None
    assert [one.run_one(), one.run_one()] == [Outcome.HANDED_ON, None]
    assert (queue.result_files(queue.store.get(job.id)), queue.store.get(job.id).progress) == (None, HALF)
    assert [two.run_one(), two.run_one()] == [Outcome.COMPLETED, None]
    done = queue.store.get(job.id)
    assert (done.state, done.claims, done.attempts) == (JobState.COMPLETED, 2, 1)
    assert sorted(path.name for path in queue.files.directory(job.id).iterdir()) == ["attempt_0002", "input.png"]


def test_work_that_is_not_there_is_made_again_and_not_for_ever(queue: JobQueue, job: Job) -> None:
    """As where the folder is not shared: the second worker never sees what the first one did."""
    one, two = worker_of(queue, FirstHalf(), ONE), worker_of(queue, SecondHalf(), TWO)
    outcomes = []
    for _ in range(3):
        assert one.run_one() is Outcome.HANDED_ON
        queue.files.clear_attempts(job.id)
        outcomes.append(two.run_one())
    assert outcomes == [Outcome.RETRIED, Outcome.RETRIED, Outcome.FAILED]
    failure = queue.store.get(job.id).failure
    assert failure is not None
    assert failure.message == "there is no motion"
    assert (one.run_one(), two.run_one()) == (None, None)


def test_a_job_cancelled_between_the_stages_goes_no_further(queue: JobQueue, job: Job) -> None:
    one, two = worker_of(queue, FirstHalf(), ONE), worker_of(queue, SecondHalf(), TWO)
    one.run_one()
    queue.remove(job.id)
    assert (one.run_one(), two.run_one()) == (None, None)
    assert not queue.files.directory(job.id).exists()


def test_a_job_cancelled_in_the_last_moment_is_not_handed_on(queue: JobQueue, job: Job) -> None:
    class Late(FirstHalf):
        def run(self, task: Task) -> Any:
            handed = super().run(task)
            queue.store.cancel(job.id)
            return handed

    assert worker_of(queue, Late(), ONE).run_one() is Outcome.CANCELLED
    assert queue.store.get(job.id).state is JobState.CANCELLED
    assert [path.name for path in queue.files.directory(job.id).iterdir()] == ["input.png"]


def test_work_is_found_behind_a_claim_that_ended_before_it_had_any(queue: JobQueue, job: Job) -> None:
    worker_of(queue, FirstHalf(), ONE).run_one()
    queue.files.attempt(job.id, 2).directory.mkdir()  # as a worker leaves it that is killed in its first moment
    begun = queue.files.begin_attempt(job.id, 3)
    assert (begun.work / "motion").read_text() == job.id


# -------------------------------------------------------------------------------------------------- real pipelines


def video_of(queue: JobQueue, job: Job) -> bytes:
    return files_of(queue, job).video.read_bytes()


Workers = dict[tuple[JobStage, ...], PipelineRunner]


@pytest.fixture(scope="module")
def runners(tiny_checkpoint: Path, pipeline: TwoStagePipeline) -> Workers:
    """Runners of one stage and of both, each with a pipeline of its own; models of any name are the tiny one."""
    pipelines = {
        (ONE,): TwoStagePipeline.of_stage(tiny_checkpoint, "stage_one", device="cpu"),
        (TWO,): TwoStagePipeline.of_stage(tiny_checkpoint, "stage_two", device="cpu"),
        ALL_STAGES: pipeline,
    }
    return {stages: PipelineRunner(lambda _name, found=found: found) for stages, found in pipelines.items()}  # type: ignore[misc]


def workers_of(queue: JobQueue, runners: Workers) -> tuple[Worker, Worker]:
    return worker_of(queue, runners[ONE,], ONE), worker_of(queue, runners[TWO,], TWO)


@pytest.mark.parametrize("changes", [{}, {"refiner": "none"}, {"guidance_scale": 2.0, "negative_prompt": "blurred"}])
def test_two_workers_make_the_video_that_one_makes(queue: JobQueue, runners: Workers, changes: dict[str, Any]) -> None:
    whole, divided = submit_real(queue, **changes), submit_real(queue, **changes)
    assert worker_of(queue, runners[ALL_STAGES]).run(max_jobs=1) == 1
    one, two = workers_of(queue, runners)
    assert [one.run_one(), two.run_one()] == [Outcome.HANDED_ON, Outcome.COMPLETED]
    assert video_of(queue, divided) == video_of(queue, whole)
    results = [queue.store.get(job.id).result for job in (whole, divided)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].notes == results[1].notes
    if changes:
        return
    # A preview is whole after the first stage, and its video begins with the second.
    preview = submit_real(queue, preview=True)
    assert one.run_one() is Outcome.COMPLETED
    video = queue.continue_preview(preview.id)
    assert video.next_stage is TWO
    assert [one.run_one(), two.run_one()] == [None, Outcome.COMPLETED]
    assert video_of(queue, video) == video_of(queue, whole)
    # Previews of earlier versions left no prompt: Stage I is asked for it, and finds its motion made.
    (prompt,) = queue.files.attempt(preview.id, 1).work.glob("prompt_*")
    prompt.unlink()
    assert queue.continue_preview(preview.id).next_stage is ONE
    assert [one.run_one(), two.run_one()] == [Outcome.HANDED_ON, Outcome.COMPLETED]


def test_progress_does_not_go_back_over_hand_over_and_drain(
    queue: JobQueue, runners: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every progress that the database ever held, written down by itself."""
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", 0.0)
    with queue.store.database.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE seen (progress TEXT)")
        connection.exec_driver_sql(
            "CREATE TRIGGER progresses AFTER UPDATE ON jobs BEGIN INSERT INTO seen VALUES "
            "(json_extract(NEW.progress, '$.percent')); END"
        )
    job = submit_real(queue)
    one, two = workers_of(queue, runners)
    assert one.run_one() is Outcome.HANDED_ON

    def drain_in_the_second(_task: Task, progress: JobProgress) -> None:
        if progress.segment == 2:
            drained.drain()

    drained = worker_of(queue, Reporting(runners[TWO,], before=drain_in_the_second), TWO)
    assert drained.run_one() is Outcome.RELEASED
    assert two.run_one() is Outcome.COMPLETED
    with queue.store.database.engine.begin() as connection:
        seen = [int(row[0]) for row in connection.exec_driver_sql("SELECT progress FROM seen")]
    assert seen == sorted(seen)
    assert {0, 30, 100} <= set(seen)
    assert queue.store.get(job.id).progress.percent == 100


STUCK_WORKER = """
import sys, time
from pathlib import Path
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import JobStage
from swifti2v.jobs.worker import Worker, WorkerOptions
percent, stages = int(sys.argv[2]), tuple(map(JobStage, sys.argv[3:]))
class Stuck(PipelineRunner):
    def run(self, task):
        report = task.report
        def stuck(progress):
            report(progress)
            if progress.percent >= percent:
                time.sleep(3600)  # until it is killed
        task.report = stuck
        return super().run(task)
queue = JobQueue.open(Path(sys.argv[1]))
options = WorkerOptions(stages=stages, lease_seconds=1.0)
Worker(queue.store, queue.files, Stuck.on_device("cpu", stages=stages), options=options).run(max_jobs=1)
"""


def killed_at(queue: JobQueue, job: Job, percent: int, *stages: JobStage) -> None:
    """Let a worker process of these stages come so far, and kill it."""
    arguments = [sys.executable, "-c", STUCK_WORKER, str(queue.files.root), str(percent), *stages]
    process = subprocess.Popen(arguments)  # noqa: S603 - our own
    try:
        wait_for(lambda: queue.store.get(job.id).progress.percent >= percent)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert queue.store.get(job.id).state is JobState.IN_PROGRESS


@pytest.mark.slow
@pytest.mark.parametrize("divided", [True, False])
def test_killed_workers_are_succeeded_and_one_video_is_made(queue: JobQueue, *, divided: bool) -> None:
    """SIGKILL in each stage; the successors go on, and the file is that of a run without a break."""
    with queue.store.database.engine.begin() as connection:
        for statement in AUDIT:
            connection.exec_driver_sql(statement)
    job = submit_real(queue, model="mini", **MINI)
    whole = PipelineRunner(lambda name: TwoStagePipeline.from_pretrained(name, device="cpu"))
    killed_at(queue, job, 15, *((ONE,) if divided else ALL_STAGES))
    if divided:
        one = PipelineRunner(lambda name: TwoStagePipeline.of_stage(name, "stage_one", device="cpu"))
        assert worker_of(queue, one, ONE).run(max_jobs=1) == 1
        assert queue.store.get(job.id).next_stage is TWO
    killed_at(queue, job, 60, *((TWO,) if divided else ALL_STAGES))
    if divided:
        assert worker_of(queue, one, ONE).run_one() is None
    again: list[JobProgress] = []
    last = Reporting(whole, before=lambda _task, progress: again.append(progress))
    assert worker_of(queue, last, *((TWO,) if divided else ALL_STAGES)).run(max_jobs=1) == 1
    assert "stage_one" not in {progress.phase for progress in again}
    assert min(progress.percent for progress in again) >= 30
    assert queue.store.get(job.id).attempts == 3
    with queue.store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
    assert audited == [job.id], "completed exactly once"
    unbroken = submit_real(queue, model="mini", **MINI)
    assert worker_of(queue, whole).run(max_jobs=1) == 1
    assert video_of(queue, job) == video_of(queue, unbroken)
