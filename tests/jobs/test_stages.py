"""Workers of one stage: which jobs they take, what they hand on, and what is left when one of them dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import WorkDirectoryError
from swifti2v.geometry import Size
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import ALL_STAGES, Job, JobProgress, JobRequest, JobResult, JobStage, JobState
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.settings import plain_choices
from tests.jobs.conftest import BROKEN, LEASE_SECONDS, StepRunner, claim, submit, wait_for
from tests.jobs.test_chaos import AUDIT

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.store import JobStore
    from tests.jobs.conftest import Clock

ONE, TWO = JobStage.ONE, JobStage.TWO
HALF = JobProgress(30, "stage_one")
OPTIONS = {"num_frames": 17, "segment_size": 1, "num_inference_steps": 1, "stage_one_steps": 2, "seed": 3}
MINI = {"size": Size(64, 32), "num_frames": 41, "segment_size": 1, "num_inference_steps": 4, "seed": 1}


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
    first, second = submit(store), submit(store)
    assert store.hand_on(claim(store, stages=(ONE,)), TWO, progress=HALF)
    assert [claim(store, stages=ALL_STAGES).id for _ in range(2)] == [first.id, second.id]


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


def submit_real(queue: JobQueue, *, model: str = "tiny", **changes: Any) -> Job:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = plain_choices({**OPTIONS, **changes})
    return queue.submit(PIL.Image.fromarray(pixels), JobRequest(model, "pan left", options))


def video_of(queue: JobQueue, job: Job) -> bytes:
    found = queue.store.get(job.id)
    assert found.state is JobState.COMPLETED, found.failure
    files = queue.result_files(found)
    assert files is not None
    return files.video.read_bytes()


@pytest.fixture(scope="module")
def runners(tiny_checkpoint: Path) -> dict[tuple[JobStage, ...], PipelineRunner]:
    """Runners of one stage and of both, each with a pipeline of its own; models of any name are the tiny one."""
    pipelines = {
        (ONE,): TwoStagePipeline.of_stage(tiny_checkpoint, "stage_one", device="cpu"),
        (TWO,): TwoStagePipeline.of_stage(tiny_checkpoint, "stage_two", device="cpu"),
        ALL_STAGES: TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu"),
    }
    return {stages: PipelineRunner(lambda _name, found=found: found) for stages, found in pipelines.items()}  # type: ignore[misc]


@pytest.mark.parametrize("changes", [{}, {"refiner": "none"}, {"guidance_scale": 2.0, "negative_prompt": "blurred"}])
def test_two_workers_make_the_video_that_one_makes(queue: JobQueue, runners: Any, changes: dict[str, Any]) -> None:
    whole, divided = submit_real(queue, **changes), submit_real(queue, **changes)
    assert worker_of(queue, runners[ALL_STAGES]).run(max_jobs=1) == 1
    one, two = worker_of(queue, runners[ONE,], ONE), worker_of(queue, runners[TWO,], TWO)
    assert [one.run_one(), two.run_one()] == [Outcome.HANDED_ON, Outcome.COMPLETED]
    assert video_of(queue, divided) == video_of(queue, whole)
    results = [queue.store.get(job.id).result for job in (whole, divided)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].notes == results[1].notes


def test_a_preview_is_whole_after_the_first_stage_and_its_video_begins_with_the_second(
    queue: JobQueue, runners: Any
) -> None:
    at_once = submit_real(queue)
    one, two = worker_of(queue, runners[ONE,], ONE), worker_of(queue, runners[TWO,], TWO)
    assert [one.run_one(), two.run_one()] == [Outcome.HANDED_ON, Outcome.COMPLETED]
    request = queue.store.get(at_once.id).request
    with PIL.Image.open(queue.files.input(at_once.id)) as image:
        preview = queue.submit(image, JobRequest("tiny", request.prompt, request.options, preview=True))
    assert one.run_one() is Outcome.COMPLETED
    video = queue.continue_preview(preview.id)
    assert video.next_stage is TWO
    assert [one.run_one(), two.run_one()] == [None, Outcome.COMPLETED]
    assert video_of(queue, video) == video_of(queue, at_once)


def test_the_video_of_a_preview_without_its_prompt_begins_with_the_first_stage(queue: JobQueue, runners: Any) -> None:
    """Previews of earlier versions left none; Stage I is asked for the prompt, and finds its motion made."""
    job = submit_real(queue)
    request = queue.store.get(job.id).request
    queue.remove(job.id)
    preview = queue.submit(PIL.Image.new("RGB", (64, 64)), JobRequest("tiny", "pan", request.options, preview=True))
    one, two = worker_of(queue, runners[ONE,], ONE), worker_of(queue, runners[TWO,], TWO)
    assert one.run_one() is Outcome.COMPLETED
    (prompt,) = queue.files.attempt(preview.id, 1).work.glob("prompt_*")
    prompt.unlink()
    assert queue.continue_preview(preview.id).next_stage is ONE
    assert [one.run_one(), two.run_one()] == [Outcome.HANDED_ON, Outcome.COMPLETED]


def test_progress_does_not_go_back_over_hand_over_and_drain(
    queue: JobQueue, runners: Any, monkeypatch: pytest.MonkeyPatch
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
    assert worker_of(queue, runners[ONE,], ONE).run_one() is Outcome.HANDED_ON
    drained = worker_of(queue, Draining(runners[TWO,]), TWO)
    drained.runner.worker = drained  # type: ignore[attr-defined]  # the runner ends the worker that it is given to
    assert drained.run_one() is Outcome.RELEASED
    assert worker_of(queue, runners[TWO,], TWO).run_one() is Outcome.COMPLETED
    with queue.store.database.engine.begin() as connection:
        seen = [int(row[0]) for row in connection.exec_driver_sql("SELECT progress FROM seen")]
    assert seen == sorted(seen)
    assert {0, 30, 100} <= set(seen)
    assert queue.store.get(job.id).progress.percent == 100


class Draining:
    """Ends its worker in the second segment."""

    worker: Worker

    def __init__(self, runner: PipelineRunner) -> None:
        self._runner = runner

    def run(self, task: Task) -> Any:
        report = task.report

        def watched(progress: JobProgress) -> None:
            if progress.segment == 2:
                self.worker.drain()
            report(progress)

        task.report = watched  # type: ignore[method-assign]  # the runner sees the protocol only
        return self._runner.run(task)


STUCK_WORKER = """
import sys, time
from pathlib import Path
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import JobStage
from swifti2v.jobs.worker import Worker, WorkerOptions
stages, phase, percent = (JobStage(sys.argv[2]),), sys.argv[2], int(sys.argv[3])
class Stuck(PipelineRunner):
    def run(self, task):
        report = task.report
        def stuck(progress):
            report(progress)
            if progress.phase == phase and progress.percent >= percent:
                time.sleep(3600)  # until it is killed
        task.report = stuck
        return super().run(task)
queue = JobQueue.open(Path(sys.argv[1]))
options = WorkerOptions(stages=stages, lease_seconds=1.0)
Worker(queue.store, queue.files, Stuck.on_device("cpu", stages=stages), options=options).run(max_jobs=1)
"""


def killed_in(queue: JobQueue, job: Job, stage: JobStage, percent: int) -> None:
    """Let a worker process of one stage come so far, and kill it."""
    arguments = [sys.executable, "-c", STUCK_WORKER, str(queue.files.root), stage.value, str(percent)]
    process = subprocess.Popen(arguments)  # noqa: S603 - our own
    try:
        wait_for(lambda: queue.store.get(job.id).progress.percent >= percent)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    held = queue.store.get(job.id)
    assert (held.state, held.next_stage) == (JobState.IN_PROGRESS, stage)


@pytest.mark.slow
def test_workers_of_either_stage_are_killed_and_one_video_is_made(queue: JobQueue) -> None:
    """SIGKILL in each stage; the successors go on, and the file is that of a run without a break."""
    with queue.store.database.engine.begin() as connection:
        for statement in AUDIT:
            connection.exec_driver_sql(statement)
    job = submit_real(queue, model="mini", **MINI.__dict__)
    killed_in(queue, job, ONE, 15)
    pipelines = {
        stage: TwoStagePipeline.of_stage("mini", stage.value, device="cpu")  # type: ignore[arg-type]  # values of both
        for stage in JobStage
    }
    one, two = (
        worker_of(queue, PipelineRunner(lambda _name, stage=stage: pipelines[stage]), stage) for stage in JobStage
    )  # type: ignore[misc]
    assert one.run(max_jobs=1) == 1
    assert queue.store.get(job.id).next_stage is TWO
    killed_in(queue, job, TWO, 60)
    assert one.run_one() is None
    assert two.run(max_jobs=1) == 1
    done = queue.store.get(job.id)
    assert (done.claims, done.attempts) == (4, 3)
    with queue.store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
    assert audited == [job.id], "completed exactly once"
    unbroken = submit_real(queue, model="mini", **MINI.__dict__)
    whole = PipelineRunner(lambda name: TwoStagePipeline.from_pretrained(name, device="cpu"))
    assert worker_of(queue, whole).run(max_jobs=1) == 1
    assert video_of(queue, job) == video_of(queue, unbroken)
