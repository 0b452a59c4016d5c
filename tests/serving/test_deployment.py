"""The service on a local Ray cluster: a model replica is killed in mid-job, and the job is done exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
import pytest

from swifti2v.errors import DeviceLostError
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobStage, JobState
from swifti2v.jobs.worker import Worker
from swifti2v.runner.acceleration import Acceleration
from swifti2v.serving.settings import ClusterSettings, ServedModel, ServiceSettings
from swifti2v.wan.taehv import LightDecoder
from tests.jobs.conftest import wait_for
from tests.jobs.test_chaos import AUDIT
from tests.runner.light_weights import write_light_weights
from tests.serving.conftest import DEFAULTS, picture_bytes

pytest.importorskip("ray", reason="Ray is not installed: pip install 'swifti2v[ray]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from swifti2v.jobs.state import Job

pytestmark = pytest.mark.slow

SHORT = {"size": "64x32", "num_frames": "9"}
LONG = {"size": "160x96", "num_frames": "81", "num_inference_steps": "50"}
ENDLESS = LONG | {"num_inference_steps": "1000"}  # longer than a replica takes to start, however busy the machine is
PATIENCE_SECONDS = 900  # Ray starts eight processes; a busy machine takes its time


def free_port() -> int:
    """Return a port that is free now: Ray's proxy takes none but a given one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.filterwarnings("ignore")  # Ray's own, when it is imported
def test_a_replica_decodes_as_it_was_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from swifti2v.serving.deployment import ModelReplica

    weights = write_light_weights(tmp_path / "light.safetensors")
    name = str(tiny_checkpoint)
    settings = ServiceSettings(data=tmp_path / "data", models=(ServedModel(name, DEFAULTS),))
    light = Acceleration("native", decoder="light", decoder_weights=str(weights))
    replica = ModelReplica(settings, ClusterSettings(acceleration=light))
    assert isinstance(replica._runner.pipeline(name).parts.decoder, LightDecoder)


@pytest.mark.filterwarnings("ignore")  # as above
def test_a_replica_whose_card_has_failed_is_to_be_replaced(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swifti2v.serving.deployment import ModelReplica

    settings = ServiceSettings(data=tmp_path / "data", models=(ServedModel(str(tiny_checkpoint), DEFAULTS),))
    replica = ModelReplica(settings, ClusterSettings())
    assert asyncio.run(replica.work()) == 0
    replica.check_health()
    calls: list[object] = []

    def fail(*_arguments: object, **_options: object) -> None:
        calls.append(1)
        raise DeviceLostError("cuda:0 does not work any more")

    monkeypatch.setattr(Worker, "run", fail)
    for _ in range(2):  # a call that comes before Ray has asked takes no job
        with pytest.raises(DeviceLostError):
            asyncio.run(replica.work())
    with pytest.raises(DeviceLostError):
        replica.check_health()
    assert len(calls) == 1


@contextmanager
def served_on_ray(data: Path, **options: object) -> Iterator[str]:
    """Run `swifti2v serve --ray` with these options, and yield its address."""
    program = "from swifti2v.cli.main import main; main()"
    port = free_port()
    options = {"model": "mini", "port": port, "device": "cpu", "data": data, **options}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, "-c", program, "serve", "--ray", "--open", *arguments])  # noqa: S603 - our own command
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "the service ended"
        try:
            return httpx2.get(f"{url}/readyz", timeout=60).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_for(ready, seconds=PATIENCE_SECONDS)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)
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
    with served_on_ray(data, **{"workers": 2, "min-workers": 2, "lease": 10}) as url:
        killed = create(url, LONG)
        others = [create(url, SHORT) for _ in range(3)]
        wait_for(lambda: store.get(killed).progress.segment >= 3, seconds=PATIENCE_SECONDS)
        first = store.get(killed)
        os.kill(process_of(first), signal.SIGKILL)
        wait_for(lambda: store.get(killed).state.is_final, seconds=PATIENCE_SECONDS)
        for other in others:
            wait_for(lambda other=other: store.get(other).state.is_final, seconds=PATIENCE_SECONDS)  # type: ignore[misc]
        job = store.get(killed)
        assert job.state is JobState.COMPLETED
        assert job.claims >= 2
        assert process_of(job) != process_of(first)
        content = httpx2.get(f"{url}/v1/videos/{killed}/content", timeout=60).content
        assert content[4:8] == b"ftyp"
        record_property("seconds", round((job.finished_at or 0) - (job.started_at or 0), 1))

        left = create(url, LONG)  # for SIGTERM, which comes when this block ends
        wait_for(lambda: store.get(left).progress.segment >= 2, seconds=PATIENCE_SECONDS)
    with store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
    assert sorted(audited) == sorted([killed, *others]), "completed exactly once, and no other"
    drained = store.get(left)
    assert (drained.state, drained.attempts) == (JobState.QUEUED, 0), "given back in good order"
    store.database.close()


def test_replicas_follow_the_queue(tmp_path: Path) -> None:
    """One waits for work; a second one comes when two jobs are there, and goes when the queue is empty."""
    data = tmp_path / "data"
    store = JobQueue.open(data).store
    with served_on_ray(data, **{"workers": 2, "min-workers": 1, "idle": 3}) as url:
        jobs = [create(url, ENDLESS) for _ in range(2)]

        def replicas() -> set[int]:
            """The processes that have the jobs, as they record it."""
            at_work = [job for job in map(store.get, jobs) if job.state is JobState.IN_PROGRESS]
            return {process_of(job) for job in at_work}

        wait_for(lambda: len(replicas()) == 2, seconds=PATIENCE_SECONDS)
        grown = replicas()
        for job in jobs:
            store.cancel(job)
        wait_for(lambda: sum(os.path.exists(f"/proc/{number}") for number in grown) == 1, seconds=PATIENCE_SECONDS)  # noqa: PTH110 - a process
        after = create(url, SHORT)
        wait_for(lambda: store.get(after).state is JobState.COMPLETED, seconds=PATIENCE_SECONDS)
        assert process_of(store.get(after)) in grown, "the one that stayed"
    store.database.close()


def test_replicas_of_one_stage_killed_in_mid_job(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two deployments, a stage each: SIGKILL in either, and each job is done exactly once, by both."""
    data = tmp_path / "data"
    queue = JobQueue.open(data)
    with queue.store.database.engine.begin() as connection:
        for statement in (*AUDIT, *WHO_DID):
            connection.exec_driver_sql(statement)
    store = queue.store
    scale = {"stage-one-workers": 1, "stage-two-workers": 2, "min-workers": 1, "lease": 10}
    with served_on_ray(data, **scale) as url:
        killed = create(url, LONG)
        others = [create(url, SHORT) for _ in range(3)]
        wait_for(lambda: store.get(killed).state is JobState.IN_PROGRESS, seconds=PATIENCE_SECONDS)
        os.kill(process_of(store.get(killed)), signal.SIGKILL)
        assert (store.get(killed).state, store.get(killed).next_stage) == (JobState.IN_PROGRESS, JobStage.ONE)
        wait_for(lambda: store.get(killed).progress.segment >= 3, seconds=PATIENCE_SECONDS)
        in_second = store.get(killed)
        assert in_second.next_stage is JobStage.TWO
        os.kill(process_of(in_second), signal.SIGKILL)
        for job_id in (killed, *others):
            wait_for(lambda job_id=job_id: store.get(job_id).state.is_final, seconds=PATIENCE_SECONDS)  # type: ignore[misc]
        jobs = {job_id: store.get(job_id) for job_id in (killed, *others)}
        assert {job.state for job in jobs.values()} == {JobState.COMPLETED}
        content = httpx2.get(f"{url}/v1/videos/{killed}/content", timeout=60).content
        assert content[4:8] == b"ftyp"
        record_property("seconds", round((jobs[killed].finished_at or 0) - (jobs[killed].started_at or 0), 1))
        record_property("claims", jobs[killed].claims)
        assert jobs[killed].claims >= 4, "two in each stage"
    with store.database.engine.begin() as connection:
        audited = [row[0] for row in connection.exec_driver_sql("SELECT job_id FROM audit")]
        did = {
            stage: {row[0].split("-")[-2] for row in connection.exec_driver_sql(WHO_DID_STAGE, (stage,))}
            for stage in ("stage_one", "stage_two")
        }
    assert sorted(audited) == sorted(jobs), "completed exactly once"
    assert did["stage_one"]
    assert did["stage_two"]
    assert not did["stage_one"] & did["stage_two"], "no process did both stages"
    store.database.close()


WHO_DID = (
    "CREATE TABLE did (worker TEXT, stage TEXT)",
    "CREATE TRIGGER claims AFTER UPDATE OF claims ON jobs "
    "BEGIN INSERT INTO did VALUES (NEW.worker, NEW.next_stage); END",
)
WHO_DID_STAGE = "SELECT worker FROM did WHERE stage = ?"
