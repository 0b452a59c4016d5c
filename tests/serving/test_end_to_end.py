"""A real server process with a real worker process, driven by the real OpenAI client, on the embedded model."""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import httpx2
import openai
import pytest

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobState
from tests.jobs.conftest import wait_for
from tests.serving.conftest import picture_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    # The client marks its videos as deprecated since Sora ended; the schema lives on in the services that follow it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PATIENCE_SECONDS = 600  # which matters on a busy machine only
SHORT = {"size": "64x32", "num_frames": 9}
LONG = {"size": "160x96", "num_frames": 81, "num_inference_steps": 4}


@dataclass
class RunningService:
    """A server process on a port of its own."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    data: Path
    client: openai.OpenAI

    def create(self, **extra: Any) -> Any:
        # Not among the client's own sizes, so it goes with the extra fields.
        reference = ("a.png", picture_bytes((64, 32)), "image/png")
        return self.client.videos.create(prompt="pan left", input_reference=reference, extra_body=extra)

    def wait(self, video_id: str) -> Any:
        self.wait_until(video_id, lambda status: status in {"completed", "failed"})
        return self.client.videos.retrieve(video_id)

    def wait_until(self, video_id: str, is_wanted: Callable[[str], bool]) -> None:
        # A key may ask 600 times a minute.
        wait_for(
            lambda: is_wanted(self.client.videos.retrieve(video_id).status),
            seconds=PATIENCE_SECONDS,
            pause_seconds=0.2,
        )

    def alive(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=60).status_code == 200
        except httpx2.TransportError:
            assert self.process.poll() is None, "the server ended"
            return False


def swifti2v(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from swifti2v.cli.main import main; main()", *arguments]


@contextmanager
def running(data: Path) -> Iterator[RunningService]:
    data.mkdir()
    command = swifti2v("serve", "--model", "mini", "--port", "0", "--device", "cpu", "--data", str(data))
    log = data / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output)  # noqa: S603 - our own

    def address() -> str:
        assert process.poll() is None, log.read_text()
        found = re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())
        return found[1] if found else ""

    try:
        wait_for(lambda: bool(address()), seconds=PATIENCE_SECONDS)
        # The first key is added beside the running service, and is in force at once.
        assert httpx2.get(f"{address()}/v1/models").status_code == 200
        adding = swifti2v("serve", "add-key", "ann", "--data", str(data))
        added = subprocess.run(adding, check=True, capture_output=True, text=True)  # noqa: S603 - our own
        assert httpx2.get(f"{address()}/v1/models").status_code == 401
        url, key = address(), added.stdout.strip()
        # A connection for each request: none that lies idle is closed by the server in the moment of its next use.
        http = openai.DefaultHttpxClient(limits=httpx2.Limits(max_keepalive_connections=0))
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http) as client:
            service = RunningService(process, url, key, data, client)
            wait_for(service.alive, seconds=PATIENCE_SECONDS)
            yield service
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    data = tmp_path_factory.mktemp("service") / "data"
    with running(data) as service:
        first = service.create(**SHORT)  # until the worker has loaded the model
        assert service.wait(first.id).status == "completed"
        yield service


def num_frames(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


def playable(content: bytes) -> bool:
    try:
        return num_frames(content) > 0
    except av.error.FFmpegError:
        return False


def test_the_whole_life_of_a_video(service: RunningService) -> None:
    client = service.client
    video = service.create(**SHORT, seed=5)
    assert (video.object, video.status, video.size, video.model) == ("video", "queued", "64x32", "mini")
    done = service.wait(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at
    content = client.videos.download_content(video.id).read()
    assert num_frames(content) == 9
    assert client.videos.download_content(video.id, variant="thumbnail").read()[:3] == b"\xff\xd8\xff"
    assert client.videos.download_content(video.id, variant="spritesheet").read()[:3] == b"\xff\xd8\xff"
    assert video.id in [found.id for found in client.videos.list(limit=1)], "pages are walked by the client itself"
    assert "mini" in [model.id for model in client.models.list()]

    same = service.create(**SHORT, seed=5)
    service.wait(same.id)
    assert client.videos.download_content(same.id).read() == content
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_errors_are_those_of_the_client(service: RunningService) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.create(size="100x100")
    assert caught.value.param == "size"
    with pytest.raises(openai.AuthenticationError):
        service.client.with_options(api_key="sk-wrong").videos.list()
    with pytest.raises(openai.NotFoundError):
        service.client.videos.download_content("video_0")


def test_a_deleted_video_frees_its_worker(
    service: RunningService, record_property: Callable[[str, object], None]
) -> None:
    """The next job begins within a step or two of the deletion; a step is timed on the job that is deleted.

    That not one more step is made, `test_deleting_cancels` counts.
    """
    store = JobQueue.open(service.data).store
    long = service.create(**(LONG | {"num_inference_steps": 200}))
    wait_for(lambda: store.get(long.id).progress.segment >= 2, seconds=PATIENCE_SECONDS)
    segment, since = store.get(long.id).progress.segment, time.time()
    wait_for(lambda: store.get(long.id).progress.segment > segment, seconds=PATIENCE_SECONDS)
    progress, moment = store.get(long.id).progress, time.time()
    step_seconds = (moment - since) / (200 * (progress.segment - segment))
    waiting = service.create(**SHORT)
    assert service.client.videos.retrieve(waiting.id).status == "queued"
    asked = time.time()
    service.client.videos.delete(long.id)
    answered = time.time()
    service.wait(waiting.id)
    started = store.get(waiting.id).started_at or 0.0
    record_property("step_milliseconds", round(1000 * step_seconds, 1))
    record_property("delete_milliseconds", round(1000 * (answered - asked), 1))
    record_property("free_milliseconds_after_request", round(1000 * (started - asked), 1))
    record_property("free_milliseconds_after_answer", round(1000 * (started - answered), 1))
    assert started - asked < 1.0
    store.database.close()


def test_the_video_can_be_watched_while_segments_are_still_to_come(service: RunningService) -> None:
    """The bytes that have come are a playable video long before the last ones: half of the steps are still to come."""
    store = JobQueue.open(service.data).store
    video = service.create(**LONG)
    service.wait_until(video.id, lambda status: status != "queued")
    headers = {"Authorization": f"Bearer {service.key}"}
    received, at_work = b"", None
    with httpx2.stream("GET", f"{service.url}/v1/videos/{video.id}/content", headers=headers, timeout=600) as response:
        assert response.headers["x-video-status"] == "in_progress"
        for piece in response.iter_raw():
            received += piece
            if at_work is None and playable(received):
                at_work = store.get(video.id)
    assert at_work is not None
    assert at_work.state is JobState.IN_PROGRESS
    assert at_work.progress.percent < 50
    assert store.get(video.id).state is JobState.COMPLETED
    assert num_frames(received) == 81
    store.database.close()


def test_a_growing_video_that_is_deleted_ends_the_connection_short(service: RunningService) -> None:
    video = service.create(**(LONG | {"num_inference_steps": 50}))
    service.wait_until(video.id, lambda status: status != "queued")
    headers = {"Authorization": f"Bearer {service.key}"}
    url = f"{service.url}/v1/videos/{video.id}/content"
    with httpx2.stream("GET", url, headers=headers, timeout=PATIENCE_SECONDS) as response:
        service.client.videos.delete(video.id)
        with pytest.raises(httpx2.RemoteProtocolError):
            response.read()


def resident_bytes(process_id: int) -> int:
    with open(f"/proc/{process_id}/statm", encoding="ascii") as file:  # noqa: PTH123 - no file of a disk
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_thousand_idle_connections_do_no_harm(
    service: RunningService, record_property: Callable[[str, object], None]
) -> None:
    """They cost little memory while they are there, and others are served beside them."""
    port = int(service.url.rsplit(":", 1)[1])
    before = resident_bytes(service.process.pid)
    idle = []
    try:
        for _ in range(1000):
            idle.append(socket.create_connection(("127.0.0.1", port)))
            idle[-1].send(b"POST /v1/videos HTTP/1.1\r\n")
        assert service.alive()
        assert service.client.videos.list(limit=1).data
        grown = resident_bytes(service.process.pid) - before
    finally:
        for connection in idle:
            connection.close()
    record_property("megabytes_of_1000_connections", round(grown / 1e6, 1))
    assert grown < 100e6


def test_sigterm_drains(service: RunningService, tmp_path: Path) -> None:
    """The job at work goes back to the queue, both processes end well, and all that they said is the log.

    (The last test of the module.)
    """
    video = service.create(**(LONG | {"num_inference_steps": 50}))
    store = JobQueue.open(service.data).store
    wait_for(lambda: store.get(video.id).progress.segment >= 2, seconds=PATIENCE_SECONDS)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(PATIENCE_SECONDS) == 0
    lines = [json.loads(line) for line in (service.data / "service.log").read_text().splitlines()]
    assert {"swifti2v.jobs.worker", "swifti2v.serving.access"} <= {line["logger"] for line in lines}
    assert not [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]
    job = store.get(video.id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    assert list((service.data / "jobs" / video.id / "attempt_0001" / "work" / "segments").glob("*.safetensors"))
    store.database.close()
