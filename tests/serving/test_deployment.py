"""The service on a local Ray cluster: a model replica is killed in mid-job, and the job is done exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
import pytest

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobState
from tests.jobs.conftest import wait_for
from tests.jobs.test_chaos import AUDIT
from tests.serving.conftest import picture_bytes

pytest.importorskip("ray", reason="Ray is not installed: pip install 'swifti2v[ray]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from swifti2v.jobs.state import Job

pytestmark = pytest.mark.slow

SHORT = {"size": "64x32", "num_frames": "9"}
LONG = {"size": "160x96", "num_frames": "81", "num_inference_steps": "50"}
START_SECONDS, WAIT_SECONDS = 400, 300  # Ray starts eight processes; a busy machine takes its time


@contextmanager
def served_on_ray(data: Path, port: int) -> Iterator[str]:
    """Run `swifti2v serve --ray` with two replicas, and yield its address."""
    program = "from swifti2v.cli.main import main; main()"
    options = {"model": "mini", "port": port, "workers": 2, "min-workers": 2, "device": "cpu", "lease": 3, "data": data}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, "-c", program, "serve", "--ray", "--open", *arguments])  # noqa: S603 - our own command
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "the service ended"
        try:
            return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_for(ready, seconds=START_SECONDS)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) in (0, -signal.SIGTERM)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def create(url: str, fields: dict[str, str]) -> str:
    files = {"input_reference": ("a.png", picture_bytes((64, 32)), "image/png")}
    response = httpx2.post(f"{url}/v1/videos", data={"prompt": "pan", **fields}, files=files, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def process_of(job: Job) -> int:
    """Return the process that has the job: it is part of the name that a worker gives itself (host-process-digits)."""
    assert job.worker is not None
    return int(job.worker.split("-")[-2])


def test_a_replica_killed_in_mid_job(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    data = tmp_path / "data"
    queue = JobQueue.open(data)
    with queue.store.database.engine.begin() as connection:
        for statement in AUDIT:
            connection.exec_driver_sql(statement)
    store = queue.store
    with served_on_ray(data, 19700 + os.getpid() % 1000) as url:
        killed = create(url, LONG)
        others = [create(url, SHORT) for _ in range(3)]
        wait_for(lambda: store.get(killed).progress.segment >= 3, seconds=WAIT_SECONDS)
        first = store.get(killed)
        os.kill(process_of(first), signal.SIGKILL)
        wait_for(lambda: store.get(killed).state.is_final, seconds=WAIT_SECONDS)
        for other in others:
            wait_for(lambda other=other: store.get(other).state.is_final, seconds=WAIT_SECONDS)  # type: ignore[misc]
        job = store.get(killed)
        assert (job.state, job.claims) == (JobState.COMPLETED, 2)
        assert process_of(job) != process_of(first)
        content = httpx2.get(f"{url}/v1/videos/{killed}/content", timeout=60).content
        assert content[4:8] == b"ftyp"
        record_property("seconds", round((job.finished_at or 0) - (job.started_at or 0), 1))

        left = create(url, LONG)  # for SIGTERM, which comes when this block ends
        wait_for(lambda: store.get(left).progress.segment >= 2, seconds=WAIT_SECONDS)
    with store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
    assert sorted(audited) == sorted([killed, *others]), "completed exactly once, and no other"
    drained = store.get(left)
    assert (drained.state, drained.attempts) == (JobState.QUEUED, 0), "given back in good order"
    store.database.close()
