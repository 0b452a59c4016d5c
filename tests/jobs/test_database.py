"""Databases: those of earlier versions, closed and busy ones, and those that cannot be opened."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import ConfigurationError, OutputError
from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.state import JobProgress, JobRequest, JobResult, JobStage, JobState, new_job_id
from swifti2v.jobs.store import JobStore
from tests.jobs.conftest import claim, submit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs.conftest import Clock

# The table as version 0.1.0 made it.
OLD_TABLE = """CREATE TABLE jobs (
    id VARCHAR(40) NOT NULL PRIMARY KEY, sequence INTEGER NOT NULL UNIQUE, owner VARCHAR(100) NOT NULL,
    model VARCHAR(400) NOT NULL, prompt TEXT NOT NULL, options TEXT NOT NULL, state VARCHAR(20) NOT NULL,
    claims INTEGER NOT NULL, releases INTEGER NOT NULL, max_attempts INTEGER NOT NULL, created_at FLOAT NOT NULL,
    available_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT, worker VARCHAR(200), lease_token VARCHAR(40),
    lease_expires_at FLOAT, progress TEXT NOT NULL, result TEXT, failure TEXT, removed BOOLEAN NOT NULL)"""
OLD_JOB = """INSERT INTO jobs VALUES (?, ?, '', ?, 'pan', '{"options": {"seed": 4}, "notes": []}', 'queued', 0, 0, 3,
    1.0, 1.0, NULL, NULL, NULL, NULL, NULL, '{}', NULL, NULL, 0)"""


def test_a_database_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = [new_job_id() for _ in range(2)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(OLD_TABLE)
        for sequence, (job_id, model) in enumerate(zip(old, ("mini", "preview:mini"), strict=True), start=1):
            connection.execute(OLD_JOB, (job_id, sequence, model))
        connection.execute("CREATE TABLE submissions (id INTEGER NOT NULL PRIMARY KEY, last_sequence INTEGER NOT NULL)")
        connection.execute("INSERT INTO submissions VALUES (1, 2)")
    with ThreadPoolExecutor(4) as pool:  # all that open it at once may find it old
        databases = list(pool.map(Database, [sqlite_url(path)] * 4))
    store = JobStore(databases[0])
    new = store.submit(new_job_id(), JobRequest("mini", "a prompt"))
    found = [store.get(job_id).request for job_id in (*old, new.id)]
    assert [(request.model, request.preview) for request in found] == [("mini", False), ("mini", True), ("mini", False)]
    assert found[1].options == {"seed": 4}
    assert {store.get(job_id).next_stage for job_id in (*old, new.id)} == {JobStage.ONE}
    claimed = [store.claim("one", lease_seconds=60, models=["mini"]) for _ in range(3)]
    assert [job.id for job in claimed if job is not None] == [*old, new.id]
    for database in databases:
        database.close()


def test_a_database_that_knows_previews_but_no_stages_goes_on(tmp_path: Path) -> None:
    """Between the versions: what is done of a job is in its files, so it begins with Stage I, which finds it there."""
    path = tmp_path / "old.db"
    job_id = new_job_id()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(OLD_TABLE)
        connection.execute("ALTER TABLE jobs ADD COLUMN preview BOOLEAN DEFAULT 0 NOT NULL")
        connection.execute(OLD_JOB.replace("NULL, NULL, 0)", "NULL, NULL, 0, 1)"), (job_id, 1, "preview:odd"))
    store = JobStore(Database(sqlite_url(path)))
    assert (store.get(job_id).request.model, store.get(job_id).request.preview) == ("preview:odd", True), "as it was"
    taken = store.claim("one", lease_seconds=60, stages=(JobStage.ONE,))
    assert taken is not None
    assert store.hand_on(taken, JobStage.TWO, progress=JobProgress(30, "stage_one"))
    again = JobStore(Database(sqlite_url(path)))
    assert again.get(job_id).next_stage is JobStage.TWO, "opened again, nothing is added twice"
    for opened in (store, again):
        opened.database.close()


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
