"""The routes: what OpenAI's clients send, and what they get."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
from openai.types import Video, VideoDeleteResponse
from openai.types.model import Model

from swifti2v.geometry import Size
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobResult, JobState
from swifti2v.serving import schemas
from swifti2v.serving.application import create_app
from swifti2v.serving.events import event_stream
from swifti2v.serving.settings import ServiceLimits
from swifti2v.settings import plain_choices
from tests.jobs.conftest import wait_for
from tests.serving.conftest import MovieRunner, create, picture_bytes, problem, queue_of, work

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.testclient import TestClient

    from swifti2v.jobs.worker import Task
    from swifti2v.serving.settings import ServiceSettings


def test_a_video_is_queued(client: TestClient) -> None:
    response = create(client, model="other", size="96x64", seconds="4", seed="7")
    assert response.status_code == 200
    video = Video.model_validate(response.json() | {"size": "1280x720"})  # the client's own list of sizes is closed
    assert (video.status, video.progress, video.model, video.prompt) == ("queued", 0, "other", "pan left")
    answer = response.json()
    assert (answer["size"], answer["num_frames"], answer["seconds"], answer["fps"], answer["seed"]) == (
        "96x64",
        33,  # 4 s of 8 frames, and the first
        "4.125",
        8.0,
        7,
    )
    job = queue_of(client).store.get(video.id)
    assert job.request.options["size"] == [96, 64]
    assert "num_inference_steps" not in job.request.options
    with PIL.Image.open(queue_of(client).files.input(video.id)) as kept:
        assert kept.size == (16, 8)
    assert client.get(f"/v1/videos/{video.id}").json() == answer


def test_how_stage_one_samples_reaches_the_job(client: TestClient) -> None:
    asked = {
        "negative_prompt": "",
        "guidance_scale": 2.0,
        "stage_one_steps": 20,
        "stage_one_guidance_scale": 3.5,
        "stage_one_guidance_scale_2": 3.0,
    }
    for given in (asked, {name: str(value) for name, value in asked.items()}):  # JSON, and a form
        body = {"prompt": "pan", "input_reference": DATA_URL} | given
        response = client.post("/v1/videos", json=body) if given is asked else create(client, **given)
        assert response.status_code == 200, response.text
        options = queue_of(client).store.get(response.json()["id"]).request.options
        assert {name: options[name] for name in asked} == asked


DATA_URL = "data:image/jpeg;base64," + base64.b64encode(picture_bytes(kind="JPEG")).decode()


@pytest.mark.parametrize("reference", [DATA_URL, {"image_url": DATA_URL}])
def test_json_works_as_well(client: TestClient, reference: Any) -> None:
    response = client.post("/v1/videos", json={"prompt": "", "input_reference": reference, "seconds": 1, "seed": None})
    assert response.status_code == 200, response.text
    assert (response.json()["num_frames"], response.json()["seed"]) == (9, 0)


def test_the_openai_clients_form_of_a_data_url(client: TestClient) -> None:
    form = {"prompt": "pan", "input_reference[image_url]": DATA_URL}
    assert client.post("/v1/videos", data=form, files={"x": b""}).status_code == 400
    boundary = "--b\r\n" + "--b\r\n".join(
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in form.items()
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/videos", content=boundary + "--b--\r\n", headers=headers).status_code == 200


def test_what_was_done_to_the_picture_is_said(client: TestClient) -> None:
    grey = PIL.Image.new("L", (8, 8))
    path = queue_of(client).files.root / "grey.png"
    grey.save(path)
    files = {"input_reference": ("../../grey.png", path.read_bytes())}
    answer = client.post("/v1/videos", data={"prompt": ""}, files=files).json()
    assert answer["notes"] == ["converted from greyscale to RGB"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "x" * 100_001}, "prompt", "shorten it"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "100x100"}, "size", "multiple"),
        ({"size": "16384x16384"}, "size", "more than this service makes"),
        ({"num_frames": "10"}, "num_frames", r"4k\+1"),
        ({"num_frames": "4001"}, "num_frames", "limit"),
        ({"num_frames": "9", "seconds": "1"}, "num_frames", "both"),
        ({"seconds": "nan"}, "seconds", "number"),
        ({"seconds": "1e9"}, "seconds", "number"),
        ({"fps": "0"}, "fps", "it should be"),
        ({"seed": "-1"}, "seed", "whole number"),
        ({"seed": "9999999999999999999"}, "seed", "it should be"),
        ({"num_inference_steps": "0"}, "num_inference_steps", "it should be"),
        ({"quality": "best"}, "quality", "is no field"),
        ({"stage_one_steps": "0"}, "stage_one_steps", "it should be"),
        ({"stage_one_flow_shift": "3"}, "stage_one_flow_shift", "no effect with few steps; ask for many"),
        ({"stage_one_guidance_scale_2": "3"}, "stage_one_guidance_scale_2", "set stage_one_guidance_scale above 1"),
    ],
)
def test_fields_that_cannot_be_used(client: TestClient, fields: Any, param: str | None, message: str) -> None:
    assert re.search(message, problem(create(client, **fields), 400, param=param))
    assert list(queue_of(client).files.ids()) == []


@pytest.mark.parametrize("value", [True, [], {}, "7.5", 1.5, float("nan"), 10**30, None])
def test_json_values_of_another_kind(client: TestClient, value: Any) -> None:
    body = {"prompt": "", "input_reference": DATA_URL, "seed": value}
    response = client.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == (200 if value is None else 400), response.text


def test_a_prompt_is_needed_and_a_picture(client: TestClient) -> None:
    files = {"input_reference": picture_bytes()}
    assert "prompt is missing" in problem(client.post("/v1/videos", files=files), 400, param="prompt")
    assert "picture is needed" in problem(
        client.post("/v1/videos", json={"prompt": "pan"}), 400, param="input_reference"
    )


def test_another_model_is_not_found(client: TestClient) -> None:
    assert "use tiny, other" in problem(create(client, model="sora-2"), 404, param="model")


def test_jobs_of_the_command_line_are_listed_too(client: TestClient) -> None:
    """What they leave open is the recommendation of their model, or of the first where theirs is not served."""
    queue = queue_of(client)
    for model in ("other", "elsewhere"):
        request = JobRequest(model, "pan", plain_choices({"seed": 4}))
        queue.submit(PIL.Image.new("RGB", (8, 4)), request)
    videos = client.get("/v1/videos", params={"order": "asc"}).json()["data"]
    shown = [(video["model"], video["size"], video["num_frames"], video["seed"]) for video in videos]
    assert shown == [("other", "64x32", 17, 4), ("elsewhere", "64x32", 9, 4)]


def test_models(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert [Model.model_validate(model).id for model in models["data"]] == ["tiny", "other"]


def test_deleting_cancels(client: TestClient) -> None:
    """The worker stops within the step in which the request comes, and the video is gone for the client at once."""
    video = create(client).json()
    steps: list[int] = []

    def delete_in_the_second(task: Task, step: int) -> None:
        steps.append(step)
        if step == 1:
            deleted = client.delete(f"/v1/videos/{video['id']}")
            assert VideoDeleteResponse.model_validate(deleted.json()).deleted
            problem(client.get(f"/v1/videos/{video['id']}"), 404)

    work(client, MovieRunner(num_steps=20, on_step=delete_in_the_second))
    assert steps == [0, 1]
    problem(client.delete(f"/v1/videos/{video['id']}"), 404)


def test_deleting_removes_the_files_of_a_finished_video(client: TestClient) -> None:
    video = create(client).json()
    work(client)
    assert client.delete(f"/v1/videos/{video['id']}").status_code == 200
    assert list(queue_of(client).files.ids()) == []
    problem(client.get(f"/v1/videos/{video['id']}/content"), 404)


def test_a_video_cancelled_by_the_operator_has_failed(client: TestClient) -> None:
    video = create(client).json()
    queue_of(client).store.cancel(video["id"])
    answer = client.get(f"/v1/videos/{video['id']}").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "cancelled")


def test_pages(client: TestClient) -> None:
    ids = [create(client).json()["id"] for _ in range(5)]
    first = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[4], ids[3])
    last = client.get("/v1/videos", params={"limit": 2, "order": "asc", "after": ids[2]}).json()
    assert [video["id"] for video in last["data"]] == ids[3:]
    assert not last["has_more"]
    for wrong in ({"limit": 0}, {"limit": "x"}, {"limit": 101}, {"order": "up"}):
        problem(client.get("/v1/videos", params=wrong), 400, param=next(iter(wrong)))
    problem(client.get("/v1/videos", params={"after": "../x"}), 404)


def test_events_end_with_the_video(client: TestClient) -> None:
    """Each change is made when the one before has been sent."""
    video = create(client).json()
    store = queue_of(client).store
    application: Any = client.app
    service = application.state.service
    received: list[tuple[str, dict[str, Any]]] = []

    def change(job: Job) -> None:
        match len(received):
            case 1:
                store.claim("one", lease_seconds=600)
            case 2:
                store.renew(job, lease_seconds=600, progress=JobProgress(50, "stage_two", 1, 2))
            case 3:
                store.complete(job, JobResult("attempt_0001"))

    async def follow() -> None:
        response = event_stream(service.follow(lambda: store.get(video["id"])), service.describe)
        async for block in response.body_iterator:
            event, data = str(block).strip().split("\n")
            received.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
            change(store.get(video["id"]))

    asyncio.run(follow())
    assert [event for event, _ in received] == ["video.progress"] * 3 + ["video.completed"]
    assert [data["progress"] for _, data in received] == [0, 0, 50, 100]
    answer = client.get(f"/v1/videos/{video['id']}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith("event: video.completed\n")


def test_a_full_queue(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    client = serve(replace(settings, limits=ServiceLimits(max_active_jobs=1)))
    assert create(client).status_code == 200
    refused = create(client)
    assert "queue is full" in problem(refused, 429)
    assert refused.headers["retry-after"] == "5"
    assert len(list(queue_of(client).files.ids())) == 1


def test_draining(settings: ServiceSettings, serve: Callable[..., TestClient]) -> None:
    client = serve(settings)
    video = create(client).json()
    assert client.get("/readyz").status_code == 200
    application: Any = client.app
    application.state.service.draining.set()
    assert client.get("/readyz").json() == {"status": "not ready", "reason": "stopping"}
    assert client.get("/healthz").status_code == 200
    problem(create(client), 503)
    assert client.get(f"/v1/videos/{video['id']}").status_code == 200
    assert client.get(f"/v1/videos/{video['id']}/events").text == ""


def test_metrics(client: TestClient) -> None:
    create(client)
    client.get("/v1/videos/video_" + "1" * 32)
    client.get("/no/such/place/" + "2" * 32)
    text = client.get("/metrics").text
    assert 'swifti2v_jobs{state="queued"} 1.0' in text
    assert 'swifti2v_http_requests_total{method="POST",route="/v1/videos",status="200"} 1.0' in text
    assert "1111" not in text
    assert "2222" not in text


def test_old_videos_are_removed_by_themselves(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    retention = replace(settings.retention, max_age_seconds=0.05)
    client = serve(replace(settings, prune_seconds=0.02, retention=retention))
    waiting = create(client).json()["id"]
    queue_of(client).store.cancel(waiting)
    wait_for(lambda: client.get(f"/v1/videos/{waiting}").status_code == 404)
    assert list(queue_of(client).files.ids()) == []


def test_the_document_names_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models"} <= set(
        document["paths"]
    )
    assert "422" not in json.dumps(document)
    assert set(document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }


def test_states_of_jobs_are_states_of_videos(client: TestClient) -> None:
    assert {schemas._status(state) for state in JobState} == {"queued", "in_progress", "completed", "failed"}


def test_a_service_without_models_is_refused(settings: ServiceSettings) -> None:
    with pytest.raises(ValueError, match="no model"):
        create_app(replace(settings, models=()))
    assert Size(64, 32) == settings.models[0].defaults.size
