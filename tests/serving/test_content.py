"""The file of a video and its pictures: finished, growing, not there."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import PIL.Image

from swifti2v.jobs.state import JobFailure, JobState
from swifti2v.serving.content import GrowingVideo
from tests.jobs.conftest import wait_for
from tests.serving.conftest import MOVIE, MovieRunner, create, problem, queue_of, work

if TYPE_CHECKING:
    import pytest
    from starlette.testclient import TestClient

    from swifti2v.jobs.worker import Task


def test_a_video_from_queue_to_result(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    video = create(client).json()
    seen: list[dict[str, Any]] = []

    def look(task: Task, step: int) -> None:
        seen.append(client.get(f"/v1/videos/{video['id']}").json())

    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", 0.0)
    work(client, MovieRunner(num_steps=4, on_step=look))
    assert [(answer["status"], answer["progress"]) for answer in seen] == [
        ("in_progress", percent) for percent in (0, 25, 50, 75)
    ]
    assert (seen[-1]["phase"], seen[-1]["segment"], seen[-1]["num_segments"]) == ("stage_two", 3, 4)
    done = client.get(f"/v1/videos/{video['id']}").json()
    assert (done["status"], done["progress"], done["notes"], done["error"]) == ("completed", 100, ["turned"], None)
    assert done["created_at"] <= done["completed_at"] < done["expires_at"]

    content = client.get(f"/v1/videos/{video['id']}/content")
    assert (content.content, content.headers["content-type"]) == (MOVIE, "video/mp4")
    for variant, size in (("thumbnail", (16, 8)), ("spritesheet", (32, 32))):
        answer = client.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
        assert answer.headers["content-type"] == "image/jpeg"
        path = queue_of(client).files.root / variant
        path.write_bytes(answer.content)
        with PIL.Image.open(path) as picture:
            assert picture.size == size


def test_ranges_of_a_finished_video(client: TestClient) -> None:
    video = create(client).json()
    work(client)

    def part(asked: str) -> Any:
        return client.get(f"/v1/videos/{video['id']}/content", headers={"Range": asked})

    for asked, span in (("0-9", slice(0, 10)), ("100-", slice(100, None)), ("-5", slice(-5, None))):
        assert (part(f"bytes={asked}").status_code, part(f"bytes={asked}").content) == (206, MOVIE[span])
        assert part(f"bytes={asked}").headers["content-range"].endswith(f"/{len(MOVIE)}")
    assert part("bytes=99999999-").status_code == 416


def test_a_growing_video_is_sent_to_its_end(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client begins before the first byte is there, and gets what is written, as it is written."""
    video = create(client).json()
    url = f"/v1/videos/{video['id']}/content"
    parts: list[Any] = []
    answers: list[Any] = []
    follows, state_of = threading.Event(), GrowingVideo._state

    def state(video: GrowingVideo) -> JobState:
        follows.set()
        return state_of(video)

    monkeypatch.setattr(GrowingVideo, "_state", state)
    follower = threading.Thread(target=lambda: answers.append(client.get(url)))

    def grow(task: Task, step: int) -> None:
        if step == 0:
            problem(client.get(url, headers={"Range": "bytes=5-"}), 409, code="video_not_ready")
            follower.start()
            wait_for(follows.is_set)
        with task.files.growing_video.open("ab") as file:
            file.write(MOVIE[1000 * step : 1000 * (step + 1)])
        parts.append(client.get(url, headers={"Range": "bytes=500-1499"}))
        if step == 1:
            problem(client.get(url, params={"variant": "thumbnail"}), 409)
            problem(client.get(url, headers={"Range": "bytes=5000-"}), 416)

    work(client, MovieRunner(num_steps=3, on_step=grow))
    follower.join()
    (answer,) = answers
    assert answer.headers["x-video-status"] == "in_progress"
    assert answer.content in (MOVIE[:3000], MOVIE)  # the whole file, where it was there before the first look
    assert [part.content for part in parts] == [MOVIE[500:1000], MOVIE[500:1500], MOVIE[500:1500]]
    assert parts[0].headers["content-range"] == "bytes 500-999/*"


def test_content_of_a_video_that_waits_or_failed(client: TestClient) -> None:
    video = create(client).json()
    url = f"/v1/videos/{video['id']}/content"
    waiting = client.get(url)
    problem(waiting, 409, code="video_not_ready")
    assert waiting.headers["retry-after"] == "1"
    store = queue_of(client).store
    job = store.claim("one", lease_seconds=60)
    assert job is not None
    store.fail(job, JobFailure("internal_error", "/secret/path: CUDA out of memory"))
    problem(client.get(url), 404, code="video_failed")
    failed = client.get(f"/v1/videos/{video['id']}").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
    assert "secret" not in json.dumps(failed)
