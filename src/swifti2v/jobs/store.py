"""The jobs in the database. Every change of state is one conditional UPDATE, so of two workers only one succeeds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, insert, or_, select, true, update

from swifti2v.errors import JobError, QueueFullError
from swifti2v.jobs.database import JOBS, SUBMISSIONS, Database
from swifti2v.jobs.rows import as_json, job_of_row, row_of_failure, row_of_request
from swifti2v.jobs.state import (
    ACTIVE_STATES,
    ALL_STAGES,
    DEFAULT_MAX_ATTEMPTS,
    FINAL_STATES,
    Job,
    JobFailure,
    JobProgress,
    JobRequest,
    JobResult,
    JobStage,
    JobState,
    is_job_id,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select, Update
    from sqlalchemy.sql.dml import ReturningUpdate

Order = Literal["asc", "desc"]

DEFAULT_MAX_ACTIVE = 1000
"""Jobs that wait or run at most, unless said otherwise."""

MAX_PAGE = 1000

_LOST = JobFailure("worker_lost", "every worker that took the job died; see the log of the workers")
_NO_LEASE: Mapping[str, Any] = {"lease_token": None, "lease_expires_at": None}


class JobStore:
    """Jobs of one database; any number of processes may open it at once.

    Times come from the clock of the machine: on several machines the clocks must agree to within a part of the lease.

    Args:
        database: where the jobs are.
        max_active: jobs that wait or run at most; `submit` refuses more.
        clock: seconds since 1970.
    """

    def __init__(
        self, database: Database, *, max_active: int = DEFAULT_MAX_ACTIVE, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = database
        self.max_active = max_active
        self._clock = clock

    def submit(
        self,
        job_id: str,
        request: JobRequest,
        *,
        owner: str = "",
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        max_active_of_owner: int | None = None,
        next_stage: JobStage = JobStage.ONE,
    ) -> Job:
        """Put a job at the end of the queue, under a name made by `new_job_id`; it begins with `next_stage`.

        Raises:
            QueueFullError: as many jobs as allowed wait or run, in all or of this owner.
        """
        now = self._clock()
        values = row_of_request(request) | {
            "id": job_id,
            "owner": owner,
            "next_stage": next_stage,
            "state": JobState.QUEUED,
            "max_attempts": max_attempts,
            "created_at": now,
            "available_at": now,
            "progress": as_json(JobProgress()),
        }

        def operation(connection: Connection) -> Job:
            # First, for it makes submitters wait for each other.
            sequence = connection.execute(_NEXT_SEQUENCE).scalar_one()
            known = connection.execute(_KNOWN, {"job": job_id}).mappings().first()
            if known is not None:  # the answer to the first try was lost
                return job_of_row(known)
            self._check_room(connection, owner, max_active_of_owner)
            return job_of_row(connection.execute(_INSERT, values | {"sequence": sequence}).mappings().one())

        return self.database.run(operation)

    def get(self, job_id: str, *, owner: str | None = None) -> Job:
        """Return a job; with `owner`, only if it is theirs.

        Raises:
            JobError: there is no such job (of this owner), or it has expired.
        """
        rows = self._select(JOBS.c.id == job_id, _owned(owner), limit=1) if is_job_id(job_id) else ()
        if not rows:
            msg = f"there is no job {job_id[:60]!r}; list the jobs to see which there are"
            raise JobError(msg)
        return rows[0]

    def list(
        self,
        *,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        states: Collection[JobState] = (),
    ) -> tuple[Job, ...]:
        """Return jobs in the order of submission, those after the job `after` in that order; at most `limit`.

        Raises:
            JobError: there is no job `after`.
        """
        conditions = [_owned(owner)]
        if after is not None:
            cursor = self.get(after, owner=owner).sequence
            conditions.append(JOBS.c.sequence > cursor if order == "asc" else JOBS.c.sequence < cursor)
        if states:
            conditions.append(JOBS.c.state.in_([str(state) for state in states]))
        return self._select(*conditions, limit=max(1, min(limit, MAX_PAGE)), order=order)

    def check_room(self) -> None:
        """Raise `QueueFullError` if as many jobs as allowed wait or run."""
        self.database.run(lambda connection: self._check_room(connection, "", None))

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state."""

        def operation(connection: Connection) -> dict[JobState, int]:
            query = select(JOBS.c.state, func.count()).where(~JOBS.c.removed).group_by(JOBS.c.state)
            found = {JobState(state): count for state, count in connection.execute(query)}
            return {state: found.get(state, 0) for state in JobState}

        return self.database.run(operation)

    def num_active(self, stages: Collection[JobStage] = ALL_STAGES) -> int:
        """Return how many jobs wait or run whose next stage is one of these."""
        query = _COUNT_ACTIVE.where(JOBS.c.next_stage.in_(stages))
        return self.database.run(lambda connection: connection.execute(query).scalar_one())

    def claim(
        self,
        worker: str,
        *,
        lease_seconds: float,
        models: Collection[str] | None = None,
        stages: Collection[JobStage] = ALL_STAGES,
    ) -> Job | None:
        """Take the oldest job that waits, or whose worker let its lease run out; None if there is none.

        Args:
            worker: name of who takes it.
            lease_seconds: how long the claim holds without `renew`.
            models: take only jobs of these.
            stages: take only jobs whose next stage is one of these.
        """
        now = self._clock()
        taking = _taking(of_models=models is not None, skip_locked=not self.database.is_sqlite)
        values = {
            "now": now,
            "models": list(models or ()),
            "stages": list(stages),
            "state": JobState.IN_PROGRESS,
            "worker": worker,
            "lease_token": secrets.token_hex(16),
            "lease_expires_at": now + lease_seconds,
        }

        def operation(connection: Connection) -> Job | None:
            connection.execute(_FAIL_LOST, {"now": now, **row_of_failure(now, _LOST), **_NO_LEASE})
            row = connection.execute(taking, values).mappings().first()
            return None if row is None else job_of_row(row)

        return self.database.run(operation)

    def holds(self, job: Job) -> bool:
        """Whether the claim by which `job` was taken still stands: not cancelled, not taken over."""
        return self._finds(_HELD, job)

    def renew(self, job: Job, *, lease_seconds: float, progress: JobProgress | None = None) -> bool:
        """Prolong the claim and record progress; tell whether the claim still stands."""
        values: dict[str, Any] = {"lease_expires_at": self._clock() + lease_seconds}
        if progress is not None:
            values["progress"] = as_json(progress)
        return self._change_held(job, values)

    def complete(self, job: Job, result: JobResult) -> bool:
        """Record the result; False if the claim no longer stands, and the result is then to be thrown away."""
        values = {
            "state": JobState.COMPLETED,
            "finished_at": self._clock(),
            "result": as_json(result),
            "progress": as_json(JobProgress(100, "frames")),
            "lease_expires_at": None,
        }
        # The token is kept, so that a repeated call after a lost answer sees that it was this claim that completed it.
        return self._change_held(job, values) or self._finds(_COMPLETED_BY, job)

    def fail(
        self,
        job: Job,
        failure: JobFailure,
        *,
        retry_seconds: float | None = None,
        next_stage: JobStage | None = None,
    ) -> bool:
        """Record a failure, or with `retry_seconds` queue the job again after so long while attempts are left.

        Where it is tried again, it begins with `next_stage`; None: where it was.
        """
        now = self._clock()
        if retry_seconds is not None and job.attempts < job.max_attempts:
            next_stage = next_stage or job.next_stage
            return self._change_held(job, {"next_stage": next_stage, **_queued(now + retry_seconds)})
        return self._change_held(job, {**row_of_failure(now, failure), **_NO_LEASE})

    def release(self, job: Job) -> bool:
        """Give a job back in good order; the attempt does not count."""
        return self._give_back(job, {})

    def hand_on(self, job: Job, next_stage: JobStage, *, progress: JobProgress) -> bool:
        """Queue a job for a worker of `next_stage`: its own stage is done; the attempt does not count.

        The job keeps its place in the queue, and shows `progress` while it waits.
        """
        return self._give_back(job, {"next_stage": next_stage, "progress": as_json(progress)})

    def let_go(self, job: Job) -> bool:
        """Say that the worker has stopped after a cancellation: its files may be removed from now on."""
        return self._change(_LET_GO, {**_claim(job), **_NO_LEASE})

    def cancel(self, job_id: str, *, owner: str | None = None) -> Job:
        """Cancel a job that waits or runs, and return it; a finished job is returned as it is.

        The worker loses its claim by this, and stops at its next step.

        Raises:
            JobError: there is no such job (of this owner).
        """
        self.get(job_id, owner=owner)
        cancelling = update(JOBS).where(JOBS.c.id == job_id, _owned(owner), _IS_ACTIVE)
        self._change(cancelling, {"state": JobState.CANCELLED, "finished_at": self._clock()})
        return self.get(job_id, owner=owner)

    def remove(self, job_id: str, *, owner: str | None = None) -> Job:
        """Cancel a job if it is active, hide it for good, and return what it was.

        Raises:
            JobError: there is no such job (of this owner).
        """
        job = self.cancel(job_id, owner=owner)
        self._change(update(JOBS).where(JOBS.c.id == job_id, _IS_FINAL), {"removed": True})
        return job

    def finished(self) -> tuple[Job, ...]:
        """Return every finished job that no worker works on any more, removed ones too, the oldest first."""
        stopped = or_(JOBS.c.state == JobState.COMPLETED, JOBS.c.lease_expires_at.is_(None), _EXPIRED)
        query = select(JOBS).where(_IS_FINAL, stopped).order_by(JOBS.c.finished_at)
        return self._jobs(query, {"now": self._clock()})

    def removed_ids(self) -> frozenset[str]:
        """Return the names of the jobs that `remove` hid and `forget` has not dropped yet."""
        query = select(JOBS.c.id).where(JOBS.c.removed)
        return self.database.run(lambda connection: frozenset(connection.execute(query).scalars()))

    def forget(self, job_id: str) -> bool:
        """Drop the record of a finished job."""
        gone = delete(JOBS).where(JOBS.c.id == job_id, _IS_FINAL)
        return self.database.run(lambda connection: connection.execute(gone).rowcount == 1)

    def known(self, job_id: str) -> bool:
        """Whether there is a record of the job, removed or not."""
        query = select(JOBS.c.id).where(JOBS.c.id == job_id)
        return self.database.run(lambda connection: connection.execute(query).first() is not None)

    def _check_room(self, connection: Connection, owner: str, max_active_of_owner: int | None) -> None:
        if connection.execute(_COUNT_ACTIVE).scalar_one() >= self.max_active:
            msg = f"the queue is full ({self.max_active} jobs wait or run); try again later"
            raise QueueFullError(msg)
        if max_active_of_owner is None:
            return
        if connection.execute(_COUNT_ACTIVE_OF, {"user": owner}).scalar_one() >= max_active_of_owner:
            msg = f"{max_active_of_owner} of your jobs wait or run, which is the limit; wait for one, or cancel one"
            raise QueueFullError(msg)

    def _give_back(self, job: Job, values: Mapping[str, Any]) -> bool:
        return self._change(_RELEASE, {**_claim(job), **_queued(self._clock()), **values})

    def _change_held(self, job: Job, values: Mapping[str, Any]) -> bool:
        return self._change(_CHANGE_HELD, {**_claim(job), **values})

    def _change(self, statement: Update, values: Mapping[str, Any]) -> bool:
        return self.database.run(lambda connection: connection.execute(statement, values).rowcount > 0)

    def _finds(self, query: Select[Any], job: Job) -> bool:
        return self.database.run(lambda connection: connection.execute(query, _claim(job)).first() is not None)

    def _select(self, *conditions: ColumnElement[bool], limit: int, order: Order = "asc") -> tuple[Job, ...]:
        ordering = JOBS.c.sequence.asc() if order == "asc" else JOBS.c.sequence.desc()
        return self._jobs(select(JOBS).where(~JOBS.c.removed, *conditions).order_by(ordering).limit(limit), {})

    def _jobs(self, query: Select[Any], values: Mapping[str, Any]) -> tuple[Job, ...]:
        return self.database.run(
            lambda connection: tuple(map(job_of_row, connection.execute(query, values).mappings()))
        )


def _owned(owner: str | None) -> ColumnElement[bool]:
    return true() if owner is None else JOBS.c.owner == owner


def _queued(available_at: float) -> dict[str, Any]:
    return {"state": JobState.QUEUED, "available_at": available_at, **_NO_LEASE}


def _claim(job: Job) -> dict[str, Any]:
    """Return the parameters that identify the claim of `job` in the statements below."""
    return {"job": job.id, "token": job.lease_token}


# Statements of a job's way, put together once: SQLAlchemy takes longer to do that than SQLite to run them. What an
# UPDATE or INSERT sets is in the values it is executed with.
_IS_ACTIVE = JOBS.c.state.in_(ACTIVE_STATES)
_IS_FINAL = JOBS.c.state.in_(FINAL_STATES)
_IN_PROGRESS = JOBS.c.state == JobState.IN_PROGRESS
_NOW = bindparam("now", type_=JOBS.c.available_at.type)
_EXPIRED = JOBS.c.lease_expires_at < _NOW
_ATTEMPTS_LEFT = JOBS.c.claims - JOBS.c.releases < JOBS.c.max_attempts
_CLAIMED_BY = and_(JOBS.c.id == bindparam("job"), JOBS.c.lease_token == bindparam("token"))

_NEXT_SEQUENCE = (
    update(SUBMISSIONS).values(last_sequence=SUBMISSIONS.c.last_sequence + 1).returning(SUBMISSIONS.c.last_sequence)
)
_KNOWN = select(JOBS).where(JOBS.c.id == bindparam("job"))
_COUNT_ACTIVE = select(func.count()).select_from(JOBS).where(_IS_ACTIVE, ~JOBS.c.removed)
_COUNT_ACTIVE_OF = _COUNT_ACTIVE.where(JOBS.c.owner == bindparam("user"))
_INSERT = insert(JOBS).returning(JOBS)

_HELD = select(JOBS.c.id).where(_CLAIMED_BY, _IN_PROGRESS)
_COMPLETED_BY = select(JOBS.c.id).where(_CLAIMED_BY, JOBS.c.state == JobState.COMPLETED)
_CHANGE_HELD = update(JOBS).where(_CLAIMED_BY, _IN_PROGRESS)
_RELEASE = _CHANGE_HELD.values(releases=JOBS.c.releases + 1)
_LET_GO = update(JOBS).where(_CLAIMED_BY, _IS_FINAL)
_FAIL_LOST = update(JOBS).where(_IN_PROGRESS, _EXPIRED, ~_ATTEMPTS_LEFT)
"""Fails the jobs whose lease ran out after their last attempt."""


@cache
def _taking(*, of_models: bool, skip_locked: bool) -> ReturningUpdate[Any]:
    """Return the statement that takes the oldest job that waits, or whose worker let its lease run out."""
    waiting = and_(JOBS.c.state == JobState.QUEUED, JOBS.c.available_at <= _NOW)
    free = or_(waiting, and_(_IN_PROGRESS, _EXPIRED, _ATTEMPTS_LEFT))
    of_stages = JOBS.c.next_stage.in_(bindparam("stages", expanding=True))
    oldest = select(JOBS.c.id).where(free, of_stages).order_by(JOBS.c.sequence).limit(1)
    if of_models:
        oldest = oldest.where(JOBS.c.model.in_(bindparam("models", expanding=True)))
    if skip_locked:  # rows of others are passed over, not waited for; SQLite, with one writer, has no such clause
        oldest = oldest.with_for_update(skip_locked=True)
    taking = update(JOBS).where(JOBS.c.id == oldest.scalar_subquery(), free).returning(JOBS)
    return taking.values(claims=JOBS.c.claims + 1, started_at=func.coalesce(JOBS.c.started_at, _NOW))
