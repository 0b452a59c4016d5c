"""A thousand jobs from eight clients, workers killed again and again, the database reopened: each is done once."""

from __future__ import annotations

import multiprocessing
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import PIL.Image
import pytest

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobRequest, JobState
from tests.jobs.trivial_worker import work

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

NUM_JOBS, NUM_CLIENTS, NUM_WORKERS = 1000, 8, 3
NUM_KILLS = 10  # spread over the jobs, not over the seconds: a quick machine kills as many as a slow one

# The database itself writes down every completion: an account that the code under test has no hand in.
AUDIT = (
    "CREATE TABLE audit (job_id TEXT)",
    "CREATE TRIGGER completions AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' "
    "BEGIN INSERT INTO audit VALUES (NEW.id); END",
)


class Workers:
    """Worker processes, of which one is killed now and then and replaced."""

    def __init__(self, root: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.jobs.trivial_worker"])
        self._root = root
        self._random = random.Random(0)  # noqa: S311 - which worker dies is no secret
        self.processes = [self._start() for _ in range(NUM_WORKERS)]

    def kill_one(self) -> None:
        place = self._random.randrange(NUM_WORKERS)
        assert self.processes[place].is_alive(), "a worker ended by itself"
        self._kill(self.processes[place])
        self.processes[place] = self._start()

    def end(self) -> None:
        for process in self.processes:
            self._kill(process)

    def _start(self) -> ForkServerProcess:
        process = self._context.Process(target=work, args=(str(self._root),), daemon=True)
        process.start()
        return process

    def _kill(self, process: ForkServerProcess) -> None:
        process.kill()  # SIGKILL
        process.join()


def submit_all(root: Path) -> list[str]:
    picture = PIL.Image.new("RGB", (4, 4))

    def client(number: int) -> list[str]:
        queue = JobQueue.open(root, max_active=NUM_JOBS)
        count = NUM_JOBS // NUM_CLIENTS
        ids = [queue.submit(picture, JobRequest("tiny"), owner=f"client {number}").id for _ in range(count)]
        queue.store.database.close()
        return ids

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return [job_id for ids in pool.map(client, range(NUM_CLIENTS)) for job_id in ids]


def wait_for_completed(queue: JobQueue, count: int) -> None:
    deadline = time.monotonic() + 900  # of patience
    while queue.store.counts()[JobState.COMPLETED] < count:
        assert time.monotonic() < deadline, queue.store.counts()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_thousand_jobs_survive_their_workers(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    queue = JobQueue.open(tmp_path, max_active=NUM_JOBS)
    with queue.store.database.engine.begin() as connection:
        for statement in AUDIT:
            connection.exec_driver_sql(statement)
    workers = Workers(tmp_path)
    started = time.monotonic()
    try:
        with ThreadPoolExecutor(1) as submitting:  # the first workers die while jobs still come in
            submitted = submitting.submit(submit_all, tmp_path)
            for num_killed in range(1, NUM_KILLS + 1):
                wait_for_completed(queue, num_killed * NUM_JOBS // (NUM_KILLS + 1))
                workers.kill_one()
                queue.store.database.close()  # and opened again by the next call
            ids = submitted.result()
        wait_for_completed(queue, NUM_JOBS)
    finally:
        workers.end()
    jobs = {job.id: job for job in queue.store.list(limit=NUM_JOBS)}
    assert sorted(jobs) == sorted(ids)
    assert {job.state for job in jobs.values()} == {JobState.COMPLETED}
    with queue.store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
    assert sorted(audited) == sorted(ids), "completed exactly once"
    for job in jobs.values():
        files = queue.result_files(job)
        assert files is not None
        assert files.video.read_text() == f"{job.id} {job.claims}"
    record_property("seconds", round(time.monotonic() - started, 1))
    record_property("num_taken_over", sum(job.claims > 1 for job in jobs.values()))
    queue.store.database.close()
