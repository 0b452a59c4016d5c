"""The store: atomic changes of state, leases, bounds, pages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import JobError, QueueFullError
from swifti2v.jobs.state import (
    JobRequest,
    JobResult,
    JobState,
    new_job_id,
)
from swifti2v.jobs.store import JobStore, Order
from tests.jobs.conftest import BROKEN, LEASE_SECONDS, claim, submit

if TYPE_CHECKING:
    from tests.jobs.conftest import Clock


def test_a_job_keeps_what_was_asked_for(store: JobStore, clock: Clock) -> None:
    options = {"size": [64, 32], "fps": None}
    request = JobRequest(
        "mini", "pan 'left'; DROP TABLE jobs --\n\u2603", options, ("turned",), preview=True, keep_motion=True
    )
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
        with pytest.raises(JobError):
            call(theirs.id, owner="ann")
    with pytest.raises(JobError):
        store.list(owner="ann", after=theirs.id)
    assert store.get(theirs.id).state is JobState.QUEUED


def test_the_queue_is_bounded(store: JobStore) -> None:
    small = JobStore(store.database, max_active=3)
    jobs = [submit(small, owner="ann", max_active_of_owner=2) for _ in range(2)]
    with pytest.raises(QueueFullError):
        submit(small, owner="ann", max_active_of_owner=2)
    submit(small, owner="bob", max_active_of_owner=2)
    with pytest.raises(QueueFullError):
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


def test_pages_hold_every_job_once(store: JobStore) -> None:
    ids = [submit(store).id for _ in range(10)]
    orders: tuple[Order, Order] = ("asc", "desc")
    for order, limit in product(orders, (1, 3, 4, 100)):
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
