"""A service in this process, on a queue whose jobs next to nothing does."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
from starlette.testclient import TestClient

from swifti2v.geometry import Size
from swifti2v.jobs.worker import Worker, WorkerOptions
from swifti2v.serving.application import create_app
from swifti2v.serving.decoding import PictureDecoder
from swifti2v.serving.keys import add_key
from swifti2v.serving.settings import ServedModel, ServiceLimits, ServiceSettings
from swifti2v.settings import GenerationSettings
from tests.jobs.conftest import StepRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.state import JobResult
    from swifti2v.jobs.worker import Task

MOVIE = bytes(range(256)) * 40

DEFAULTS = GenerationSettings(size=Size(64, 32), num_frames=9, fps=8.0, refiner="concat")


def picture_bytes(size: tuple[int, int] = (16, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    models = (ServedModel("tiny", DEFAULTS), ServedModel("other", replace(DEFAULTS, num_frames=17)))
    return ServiceSettings(data=tmp_path / "data", models=models, poll_seconds=0.01)


class SharedDecoder(PictureDecoder):
    """Outlives the services that use it: to start its processes anew for every test would take most of the time."""

    def close(self) -> None:
        """Do nothing yet."""

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="session")
def decoder_of_all() -> Iterator[SharedDecoder]:
    limits = ServiceLimits()
    decoder = SharedDecoder(max_pixels=limits.max_image_pixels, seconds=limits.decode_seconds)
    yield decoder
    decoder.end()


@pytest.fixture
def serve(decoder_of_all: SharedDecoder) -> Iterator[Callable[[ServiceSettings], TestClient]]:
    """Start services, and end them with the test."""
    clients = []

    def start(settings: ServiceSettings) -> TestClient:
        client = TestClient(create_app(settings, decoder=decoder_of_all), base_url="http://service")
        clients.append(client.__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serve: Callable[..., TestClient], settings: ServiceSettings) -> TestClient:
    """An open service."""
    return serve(settings)


@pytest.fixture
def keyed(serve: Callable[..., TestClient], settings: ServiceSettings, tmp_path: Path) -> tuple[TestClient, str, str]:
    """A service with the keys of Ann and Bob; Ann may have two active jobs."""
    ann = add_key(tmp_path / "keys.json", "ann", max_active_jobs=2)
    bob = add_key(tmp_path / "keys.json", "bob")
    return serve(replace(settings, keys=tmp_path / "keys.json")), ann, bob


def queue_of(client: TestClient) -> JobQueue:
    application: Any = client.app
    return application.state.service.queue


def create(client: TestClient, *, key: str | None = None, **fields: Any) -> Any:
    """Create a video by a form and return the response."""
    headers = {} if key is None else bearer(key)
    files = {"input_reference": ("a.png", picture_bytes(), "image/png")}
    return client.post("/v1/videos", data={"prompt": "pan left", **fields}, files=files, headers=headers)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class MovieRunner(StepRunner):
    """Leaves the files of a job, whose bytes are known."""

    def run(self, task: Task) -> JobResult:
        result = super().run(task)
        task.files.video.write_bytes(MOVIE)
        task.files.thumbnail.write_bytes(picture_bytes(kind="JPEG"))
        task.files.spritesheet.write_bytes(picture_bytes((32, 32), kind="JPEG"))
        return replace(result, notes=("turned",))


def work(client: TestClient, runner: Any = None) -> Worker:
    queue = queue_of(client)
    worker = Worker(queue.store, queue.files, runner or MovieRunner(), options=WorkerOptions(poll_seconds=0.01))
    worker.run(until_idle=True)
    return worker


def problem(response: Any, status: int, *, param: str | None = None) -> str:
    """Check that a response is OpenAI's error object, and return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert response.headers["x-request-id"]
    return str(error["message"])
