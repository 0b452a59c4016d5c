"""Databases of earlier versions: opened, brought up to date, and worked on."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.state import JobRequest, new_job_id
from swifti2v.jobs.store import JobStore

if TYPE_CHECKING:
    from pathlib import Path

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
    claimed = [store.claim("one", lease_seconds=60, models=["mini"]) for _ in range(3)]
    assert [job.id for job in claimed if job is not None] == [*old, new.id]
    for database in databases:
        database.close()
