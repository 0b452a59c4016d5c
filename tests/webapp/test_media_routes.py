"""The files of jobs over HTTP: served, saved, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from swifti2v.webapp.media_routes import POLICY, ContentPolicy, media_route

if TYPE_CHECKING:
    from swifti2v.jobs.worker import Worker
    from swifti2v.webapp.studio import Form, Studio


@pytest.fixture
def client(studio: Studio) -> TestClient:
    application = Starlette(routes=[media_route(studio.queue)])
    application.add_middleware(ContentPolicy)
    return TestClient(application, base_url="http://localhost")


def test_files_are_served_and_saved(client: TestClient, studio: Studio, form: Form, worker: Worker) -> None:
    job = studio.video(form)
    assert client.get(f"/media/{job.id}/video").status_code == 404
    worker.run(until_idle=True)
    whole = client.get(f"/media/{job.id}/video")
    assert whole.headers["content-type"] == "video/mp4"
    files = studio.queue.result_files(studio.queue.store.get(job.id))
    assert files is not None
    assert whole.content == files.video.read_bytes()
    assert client.get(f"/media/{job.id}/growing").content == whole.content  # asked for just before it was finished
    part = client.get(f"/media/{job.id}/video", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    saved = client.get(f"/media/{job.id}/video?download")
    assert saved.headers["content-disposition"] == f'attachment; filename="swifti2v_{job.id[6:14]}.mp4"'
    assert client.get(f"/media/{job.id}/thumbnail").content[:2] == b"\xff\xd8"
    assert client.get(f"/media/{job.id}/input").content[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "path", ["video_1/input", "..%2F..%2Fqueue.db/input", "{job}/queue.db", "{job}/..%2F..%2Fqueue.db", "{job}/growing"]
)
def test_nothing_else_is_served(client: TestClient, studio: Studio, form: Form, path: str) -> None:
    job = studio.video(form)
    answer = client.get("/media/" + path.format(job=job.id))
    assert answer.status_code == 404
    assert str(studio.queue.files.root) not in answer.text


def test_a_growing_video_is_served_as_far_as_it_is_whole(client: TestClient, studio: Studio, form: Form) -> None:
    job = studio.video(form)
    claimed = studio.queue.store.claim("w", lease_seconds=60)
    assert claimed is not None
    files = studio.queue.files.begin_attempt(job.id, claimed.claims)
    address = f"/media/{job.id}/growing"
    head, fragment = b"\0\0\0\x0cmoov1234", b"\0\0\0\x08moof\0\0\0\x0amdatxy"
    files.growing_video.write_bytes(head + fragment + fragment[:-1])
    answer = client.get(address)
    assert answer.content == head + fragment
    assert answer.headers["cache-control"] == "no-store"
    files.growing_video.write_bytes(head[:5])
    assert client.get(address).status_code == 404


def test_every_answer_carries_the_policy(client: TestClient) -> None:
    headers = client.get("/media/video_1/input").headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert "http" not in POLICY
