"""The store against a model, in any order of calls, and between processes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swifti2v.errors import QueueFullError
from swifti2v.jobs.database import Database
from swifti2v.jobs.state import ACTIVE_STATES, FOLLOWERS, Job, JobResult, JobState
from swifti2v.jobs.store import JobStore
from tests.jobs.conftest import BROKEN, LEASE_SECONDS, submit

if TYPE_CHECKING:
    from pathlib import Path

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
