"""The routes: what OpenAI's clients send, and what they get."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
from openai.types import Video, VideoDeleteResponse
from openai.types.model import Model

from swifti2v.errors import InvalidInputError
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobResult, JobStage
from swifti2v.jobs.worker import Outcome, Worker, WorkerOptions
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.serving.application import create_app
from swifti2v.serving.content import event_stream
from swifti2v.serving.settings import ServiceLimits
from tests.jobs.conftest import Reporting, wait_for
from tests.serving.conftest import MovieRunner, create, picture_bytes, problem, queue_of, work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starlette.testclient import TestClient

    from swifti2v.jobs.worker import Task
    from swifti2v.serving.settings import ServiceSettings

DATA_URL = "data:image/jpeg;base64," + base64.b64encode(picture_bytes(kind="JPEG")).decode()


def test_a_video_is_queued(client: TestClient) -> None:
    response = create(client, model="other", size="96x64", seconds="4", seed="7")
    assert response.status_code == 200
    video = Video.model_validate(response.json() | {"size": "1280x720"})  # the client's own list of sizes is closed
    assert (video.status, video.progress, video.model, video.prompt) == ("queued", 0, "other", "pan left")
    answer = response.json()
    told = (answer["size"], answer["num_frames"], answer["seconds"], answer["fps"], answer["seed"])
    assert told == ("96x64", 33, "4.125", 8.0, 7), "4 s of 8 frames, and the first"
    job = queue_of(client).store.get(video.id)
    assert job.request.options["size"] == [96, 64]
    assert job.request.options.get("num_inference_steps") is None
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


@pytest.mark.parametrize("reference", [DATA_URL, {"image_url": DATA_URL}])
def test_json_works_as_well(client: TestClient, reference: Any) -> None:
    body = {"prompt": "", "input_reference": reference, "seconds": "1", "seed": None}
    response = client.post("/v1/videos", json=body)
    assert response.status_code == 200, response.text
    assert (response.json()["num_frames"], response.json()["seed"]) == (9, 0)


def test_the_openai_clients_form_of_a_data_url(client: TestClient) -> None:
    form = {"prompt": "pan", "input_reference[image_url]": DATA_URL}
    boundary = "--b\r\n" + "--b\r\n".join(
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in form.items()
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/videos", content=boundary + "--b--\r\n", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x" * 100_001}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"negative_prompt": "a\0b"}, "negative_prompt"),
        ({"size": "big"}, "size"),
        ({"size": "100x100"}, "size"),
        ({"size": "16384x16384"}, "size"),
        ({"num_frames": "10"}, "num_frames"),
        ({"num_frames": "4001"}, "num_frames"),
        ({"num_frames": "9", "seconds": "1"}, "num_frames"),
        ({"seconds": "nan"}, "seconds"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": "3000"}, "seconds"),
        ({"seconds": "-1"}, "seconds"),
        ({"fps": "0"}, "fps"),
        ({"fps": "nan"}, "fps"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "9999999999999999999"}, "seed"),
        ({"num_inference_steps": "0"}, "num_inference_steps"),
        ({"quality": "best"}, "quality"),
        ({"segment_size": "1000"}, "segment_size"),  # how much memory a run takes is not the client's to say
        ({"stage_one_steps": "0"}, "stage_one_steps"),
        ({"stage_one_flow_shift": "3"}, "stage_one_flow_shift"),
        ({"stage_one_guidance_scale_2": "3"}, "stage_one_guidance_scale_2"),
    ],
)
def test_fields_that_cannot_be_used(shared: TestClient, fields: Any, param: str) -> None:
    problem(create(shared, **fields), param=param)


def test_json_values_of_another_kind(shared: TestClient) -> None:
    for value in (True, [], {}, "7.5", 1.5, float("nan"), 10**30):
        body = {"prompt": "", "input_reference": DATA_URL, "seed": value}
        sent = shared.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
        problem(sent, param="seed")


def test_what_is_missing_is_named(shared: TestClient) -> None:
    problem(shared.post("/v1/videos", files={"input_reference": picture_bytes()}), param="prompt")
    problem(shared.post("/v1/videos", json={"prompt": "pan"}), param="input_reference")
    problem(create(shared, model="sora-2"), 404, param="model", code="model_not_found")


def test_jobs_of_the_command_line_are_listed_too(client: TestClient) -> None:
    """What they leave open is the recommendation of their model, or of the first where theirs is not served."""
    queue = queue_of(client)
    for model in ("other", "elsewhere"):
        queue.submit(PIL.Image.new("RGB", (8, 4)), JobRequest(model, "pan", {"seed": 4, "few_step": False}))
    videos = client.get("/v1/videos", params={"order": "asc"}).json()["data"]
    shown = [(video["model"], video["size"], video["num_frames"], video["seed"]) for video in videos]
    assert shown == [("other", "64x32", 17, 4), ("elsewhere", "64x32", 9, 4)]


def test_models(shared: TestClient) -> None:
    models = shared.get("/v1/models").json()
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
        problem(client.get("/v1/videos", params=wrong), param=next(iter(wrong)))
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


def test_progress_is_monotone_over_the_stages(
    client: TestClient, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client sees of a video whose stages are made by two workers."""
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", 0.0)
    video = create(client, size="64x64", num_frames="9").json()["id"]
    queue, seen = queue_of(client), []  # type: ignore[var-annotated]  # JSON

    def worker(stage: JobStage) -> Worker:
        runner = PipelineRunner(lambda _name: TwoStagePipeline.of_stage(tiny_checkpoint, stage.value, device="cpu"))
        asking = Reporting(runner, after=lambda *_: seen.append(client.get(f"/v1/videos/{video}").json()))
        return Worker(queue.store, queue.files, asking, options=WorkerOptions(stages=(stage,)))

    assert worker(JobStage.ONE).run_one() is Outcome.HANDED_ON
    between = client.get(f"/v1/videos/{video}").json()
    assert (between["status"], between["progress"]) == ("queued", 30)
    assert client.get(f"/v1/videos/{video}/content").status_code == 409
    metrics = client.get("/metrics").text
    assert 'swifti2v_active_jobs{stage="stage_one"} 0.0' in metrics
    assert 'swifti2v_active_jobs{stage="stage_two"} 1.0' in metrics
    assert worker(JobStage.TWO).run_one() is Outcome.COMPLETED
    done = client.get(f"/v1/videos/{video}").json()
    percents = [answer["progress"] for answer in (*seen, done)]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {answer["status"] for answer in seen} == {"in_progress"}
    assert {answer["phase"] for answer in seen if answer["phase"]} == {"stage_one", "stage_two"}
    assert client.get(f"/v1/videos/{video}/content").status_code == 200


def test_a_full_queue(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    client = serve(replace(settings, limits=ServiceLimits(max_active_jobs=1)))
    assert create(client).status_code == 200
    refused = create(client, picture=b"is not looked at")
    problem(refused, 429, code="queue_full")
    assert refused.headers["retry-after"] == "5"
    assert len(list(queue_of(client).files.ids())) == 1


def test_draining(client: TestClient) -> None:
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


def test_the_document_describes_the_service(shared: TestClient) -> None:
    document = shared.get("/openapi.json").json()
    wanted = {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models"}
    assert wanted <= set(document["paths"])
    assert "422" not in json.dumps(document)
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert "$ref" not in json.dumps(body)
    assert body["application/json"]["schema"]["required"] == ["prompt", "input_reference"]


def test_pages_of_allowed_origins_may_call(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    client = serve(replace(settings, allowed_origins=("https://a.example",), root_path="/video"))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        preflight = client.options("/v1/videos", headers=asked | {"Origin": origin})
        assert preflight.headers.get("access-control-allow-origin") == allowed
        problem_there = client.get("/v1/videos/video_0", headers={"Origin": origin})
        assert problem_there.headers.get("access-control-allow-origin") == allowed


def test_a_proxy_may_offer_the_service_below_a_path(
    serve: Callable[..., TestClient], settings: ServiceSettings
) -> None:
    """Whether the proxy takes the path away or not."""
    client = serve(replace(settings, root_path="/video"))
    assert client.get("/v1/models").status_code == client.get("/video/v1/models").status_code == 200
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/video"}]
    assert (
        "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "https://a.example"}).headers
    )


def test_a_service_without_models_is_refused(settings: ServiceSettings) -> None:
    with pytest.raises(InvalidInputError):
        create_app(replace(settings, models=()))
