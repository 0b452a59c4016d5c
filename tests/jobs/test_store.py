"""The store: atomic changes of state, leases, bounds, pages; against a model, and between processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swifti2v.errors import ConfigurationError, JobError, OutputError, QueueFullError
from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.state import (
    ACTIVE_STATES,
    FOLLOWERS,
    Job,
    JobFailure,
    JobProgress,
    JobRequest,
    JobResult,
    JobState,
    new_job_id,
)
from swifti2v.jobs.store import JobStore

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs.conftest import Clock

LEASE_SECONDS = 10.0
BROKEN = JobFailure("internal_error", "it broke")


def submit(store: JobStore, *, owner: str = "", model: str = "tiny", **options: Any) -> Job:
    return store.submit(new_job_id(), JobRequest(model, "a prompt"), owner=owner, **options)


def claim(store: JobStore, worker: str = "one", **options: Any) -> Job:
    job = store.claim(worker, lease_seconds=LEASE_SECONDS, **options)
    assert job is not None
    return job


def test_a_job_keeps_what_was_asked_for(store: JobStore, clock: Clock) -> None:
    options = {"size": [64, 32], "fps": None}
    request = JobRequest("mini", "pan 'left'; DROP TABLE jobs --\n\u2603", options, ("turned",), preview=True)
    job_id = new_job_id()
    store.submit(job_id, request, owner="ann", max_attempts=2)
    job = store.get(job_id)
    assert job.request == request
    assert (job.owner, job.max_attempts, job.created_at, job.state) == ("ann", 2, clock.now, JobState.QUEUED)
    assert (job.claims, job.worker, job.lease_token, job.result, job.failure) == (0, None, None, None, None)


def test_jobs_are_claimed_in_the_order_of_submission(store: JobStore) -> None:
    ids = [submit(store).id for _ in range(5)]
    assert [claim(store).id for _ in ids] == ids
    assert store.claim("one", lease_seconds=1) is None


def test_a_worker_takes_only_jobs_of_its_models(store: JobStore) -> None:
    submit(store, model="large")
    small = submit(store, model="small")
    assert store.claim("one", lease_seconds=1, models=["other"]) is None
    assert claim(store, models=["small", "other"]).id == small.id


def test_a_job_is_completed_once(store: JobStore) -> None:
    submit(store)
    job = claim(store)
    first, second = JobResult("attempt_0001", notes=("one",)), JobResult("attempt_0009")
    assert store.complete(job, first)
    assert store.complete(job, second), "the same claim asks again because the answer was lost"
    assert not store.fail(job, BROKEN)
    assert not store.release(job)
    done = store.get(job.id)
    assert (done.state, done.result, done.progress.percent) == (JobState.COMPLETED, first, 100)


def test_a_dead_worker_loses_the_job_to_another(store: JobStore, clock: Clock) -> None:
    submit(store)
    first = claim(store)
    clock.advance(LEASE_SECONDS - 1)
    assert store.claim("two", lease_seconds=1) is None
    assert store.renew(first, lease_seconds=LEASE_SECONDS)
    clock.advance(LEASE_SECONDS - 1)
    assert store.claim("two", lease_seconds=1) is None
    clock.advance(2)
    second = claim(store, "two")
    assert (second.id, second.claims, second.attempts, second.worker) == (first.id, 2, 2, "two")
    assert not store.holds(first)
    assert not store.renew(first, lease_seconds=LEASE_SECONDS)
    assert not store.complete(first, JobResult("attempt_0001"))
    assert not store.fail(first, BROKEN)
    assert store.complete(second, JobResult("attempt_0002"))
    assert store.get(first.id).result == JobResult("attempt_0002")


def test_a_late_worker_goes_on_if_nobody_took_its_job(store: JobStore, clock: Clock) -> None:
    submit(store)
    job = claim(store)
    clock.advance(10 * LEASE_SECONDS)
    assert store.renew(job, lease_seconds=LEASE_SECONDS)
    assert store.claim("two", lease_seconds=1) is None


def test_attempts_are_bounded_when_workers_die(store: JobStore, clock: Clock) -> None:
    submit(store, max_attempts=2)
    for _ in range(2):
        job = claim(store)
        clock.advance(LEASE_SECONDS + 1)
    assert store.claim("two", lease_seconds=1) is None
    failed = store.get(job.id)
    assert failed.state is JobState.FAILED
    assert failed.failure is not None
    assert failed.failure.code == "worker_lost"


def test_attempts_are_bounded_when_jobs_fail(store: JobStore, clock: Clock) -> None:
    submit(store, max_attempts=2)
    assert store.fail(claim(store), BROKEN, retry_seconds=5)
    assert store.claim("one", lease_seconds=1) is None, "not before its pause is over"
    clock.advance(6)
    job = claim(store)
    assert store.fail(job, BROKEN, retry_seconds=5)
    assert (store.get(job.id).state, store.get(job.id).failure) == (JobState.FAILED, BROKEN)


def test_giving_back_costs_no_attempt(store: JobStore) -> None:
    submit(store, max_attempts=1)
    for number in range(1, 4):
        job = claim(store)
        assert (job.claims, job.attempts) == (number, 1)
        assert store.release(job)
    assert store.complete(claim(store), JobResult("attempt_0004"))


def test_cancelling_takes_the_claim_away(store: JobStore, clock: Clock) -> None:
    submit(store)
    job = claim(store)
    assert store.cancel(job.id).state is JobState.CANCELLED
    assert not store.holds(job)
    assert not store.complete(job, JobResult("attempt_0001"))
    assert store.finished() == (), "its worker may still write"
    assert store.let_go(job)
    assert [found.id for found in store.finished()] == [job.id]
    assert store.cancel(job.id).state is JobState.CANCELLED

    submit(store)
    other = claim(store)
    store.cancel(other.id)
    clock.advance(LEASE_SECONDS + 1)
    assert other.id in [found.id for found in store.finished()], "its worker is dead"


def test_a_finished_job_cannot_be_cancelled(store: JobStore) -> None:
    submit(store)
    job = claim(store)
    store.complete(job, JobResult("attempt_0001"))
    assert store.cancel(job.id).state is JobState.COMPLETED


def test_owners_do_not_see_each_other(store: JobStore) -> None:
    mine, theirs = submit(store, owner="ann"), submit(store, owner="bob")
    assert [job.id for job in store.list(owner="ann")] == [mine.id]
    for call in (store.get, store.cancel, store.remove):
        with pytest.raises(JobError, match="there is no job"):
            call(theirs.id, owner="ann")
    with pytest.raises(JobError, match="there is no job"):
        store.list(owner="ann", after=theirs.id)
    assert store.get(theirs.id).state is JobState.QUEUED


def test_the_queue_is_bounded(store: JobStore) -> None:
    small = JobStore(store.database, max_active=3)
    jobs = [submit(small, owner="ann", max_active_of_owner=2) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 of your jobs"):
        submit(small, owner="ann", max_active_of_owner=2)
    submit(small, owner="bob", max_active_of_owner=2)
    with pytest.raises(QueueFullError, match="the queue is full"):
        submit(small, owner="eve")
    small.cancel(jobs[0].id)
    submit(small, owner="ann", max_active_of_owner=2)


def test_the_bound_holds_against_many_at_once(store: JobStore) -> None:
    small = JobStore(store.database, max_active=10)

    def attempt(_number: int) -> bool:
        try:
            submit(small)
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(attempt, range(40)))
    assert sum(accepted) == 10
    assert small.counts()[JobState.QUEUED] == 10
    sequences = [job.sequence for job in small.list(limit=100, order="asc")]
    assert sequences == sorted(set(sequences))


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 4, 100])
def test_pages_hold_every_job_once(store: JobStore, order: Any, limit: int) -> None:
    ids = [submit(store).id for _ in range(10)]
    found: list[str] = []
    while page := store.list(after=found[-1] if found else None, limit=limit, order=order):
        found += [job.id for job in page]
    assert found == (ids if order == "asc" else ids[::-1])


def test_removed_jobs_are_gone_for_their_owner(store: JobStore) -> None:
    job = submit(store)
    assert store.remove(job.id).state is JobState.CANCELLED
    with pytest.raises(JobError):
        store.get(job.id)
    assert store.list() == ()
    assert store.removed_ids() == {job.id}
    assert store.known(job.id)
    assert store.forget(job.id)
    assert not store.known(job.id)


def test_a_job_at_work_is_not_forgotten(store: JobStore) -> None:
    job = submit(store)
    assert not store.forget(job.id)
    claim(store)
    assert not store.forget(job.id)


def test_a_closed_database_opens_again(store: JobStore, tmp_path: Path, clock: Clock) -> None:
    submit(store)
    job = claim(store)
    store.database.close()
    assert store.renew(job, lease_seconds=5, progress=JobProgress(40, "stage_two", 1, 2))
    with_another = JobStore(Database(sqlite_url(tmp_path / "queue.db")), clock=clock)
    assert with_another.get(job.id).progress == JobProgress(40, "stage_two", 1, 2)
    assert with_another.complete(job, JobResult("attempt_0001"))
    with_another.database.close()
    assert store.get(job.id).state is JobState.COMPLETED


@pytest.mark.parametrize("url", ["nonsense", "nodriver://host/name", "postgresql+nodriver://host/name"])
def test_a_bad_url_names_the_fix(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"sqlite:///queue\.db"):
        Database(url)


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the job database fails"):
        Database(sqlite_url(tmp_path / "missing" / "queue.db"))
    (tmp_path / "text.db").write_text("this is not a database, but long enough to be mistaken for one" * 10)
    with pytest.raises(OutputError, match="not a database"):
        Database(sqlite_url(tmp_path / "text.db"))


def test_a_busy_database_is_waited_for(store: JobStore) -> None:
    held, freed = threading.Event(), threading.Event()

    def hold() -> None:
        with store.database.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            held.set()
            freed.wait()
            connection.rollback()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    threading.Timer(0.2, freed.set).start()
    assert submit(store).state is JobState.QUEUED
    holder.join()


CLAIMER = """
import sys
from pathlib import Path
from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.store import JobStore
store = JobStore(Database(sqlite_url(Path(sys.argv[1]))))
sys.stdin.readline()
while (job := store.claim("p", lease_seconds=60)) is not None:
    print(job.id)
"""


@pytest.mark.slow
def test_processes_never_claim_the_same_job(store: JobStore, tmp_path: Path) -> None:
    wide = JobStore(store.database, max_active=1000)
    ids = [submit(wide).id for _ in range(120)]
    command = [sys.executable, "-c", CLAIMER, str(tmp_path / "queue.db")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    claimers = [subprocess.Popen(command, **pipes) for _ in range(3)]  # noqa: S603 - our own
    taken = []
    for claimer in claimers:
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    for claimer in claimers:
        taken += claimer.communicate(timeout=600)[0].split()
        assert claimer.returncode == 0
    assert sorted(taken) == sorted(ids)


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls: states only follow as `FOLLOWERS` says, and one claim at most stands for a job."""

    @initialize()
    def open(self) -> None:
        self.now = 0.0
        self.store = JobStore(Database("sqlite://"), max_active=4, clock=lambda: self.now)
        self.last: dict[str, JobState] = {}
        self.claims: list[Job] = []
        self.completed: dict[str, str] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.database.close()

    def some_claim(self, number: int) -> Job:
        return self.claims[number % len(self.claims)]

    def some_id(self, number: int) -> str:
        return sorted(self.last)[number % len(self.last)]

    @rule(owner=st.sampled_from(["ann", "bob"]))
    def submit(self, owner: str) -> None:
        active = sum(state in ACTIVE_STATES for state in self.last.values())
        try:
            job = submit(self.store, owner=owner, max_attempts=2)
        except QueueFullError:
            assert active == 4
        else:
            assert active < 4
            self.last[job.id] = job.state

    @rule()
    def claim(self) -> None:
        before = {job.id: job for job in self.store.list(limit=100)}
        job = self.store.claim("worker", lease_seconds=LEASE_SECONDS)
        if job is not None:
            old = before[job.id]
            assert old.state is JobState.QUEUED or (old.lease_expires_at or 0) < self.now
            assert job.attempts <= job.max_attempts
            self.claims.append(job)

    @rule(seconds=st.sampled_from([1.0, 6.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.claims)
    @rule(number=st.integers(0, 20))
    def complete(self, number: int) -> None:
        job = self.some_claim(number)
        if self.store.complete(job, JobResult(job.lease_token or "")):
            assert self.completed.setdefault(job.id, job.lease_token or "") == job.lease_token

    @precondition(lambda self: self.claims)
    @rule(number=st.integers(0, 20), what=st.sampled_from(["renew", "release", "fail", "retry", "let_go"]))
    def change(self, number: int, what: str) -> None:
        job = self.some_claim(number)
        held = self.store.holds(job)
        done = {
            "renew": lambda: self.store.renew(job, lease_seconds=LEASE_SECONDS),
            "release": lambda: self.store.release(job),
            "fail": lambda: self.store.fail(job, BROKEN),
            "retry": lambda: self.store.fail(job, BROKEN, retry_seconds=1),
            "let_go": lambda: self.store.let_go(job),
        }[what]()
        assert done == held or what == "let_go"

    @precondition(lambda self: self.last)
    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        job_id = self.some_id(number)
        was = self.last[job_id]
        assert self.store.cancel(job_id).state is (was if was.is_final else JobState.CANCELLED)

    @invariant()
    def states_follow(self) -> None:
        if not hasattr(self, "store"):
            return
        jobs = self.store.list(limit=100)
        assert {job.id for job in jobs} == set(self.last)
        for job in jobs:
            before = self.last[job.id]
            assert job.state is before or job.state in FOLLOWERS[before]
            assert (job.state is JobState.COMPLETED) == (job.result is not None)
            assert (job.state is JobState.COMPLETED) == (job.id in self.completed)
            assert job.result is None or job.result.directory == self.completed[job.id]
            assert sum(self.store.holds(claim) for claim in self.claims if claim.id == job.id) <= 1
            self.last[job.id] = job.state


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreMachine = pytest.mark.slow(StoreMachine.TestCase)
