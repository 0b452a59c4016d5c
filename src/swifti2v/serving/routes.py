"""The routes of `/v1`, as OpenAI's clients call them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import Response

from swifti2v.errors import QueueFullError
from swifti2v.jobs.queue import JobQueue  # noqa: TC001 - FastAPI and dataclasses read annotations as they run
from swifti2v.jobs.state import ACTIVE_STATES, Job
from swifti2v.jobs.store import Order  # noqa: TC001 - as above
from swifti2v.serving.access import Access, Caller
from swifti2v.serving.content import Follow, Variant, content_response
from swifti2v.serving.decoding import PictureDecoder  # noqa: TC001 - as above
from swifti2v.serving.events import event_stream
from swifti2v.serving.problems import ApiProblem
from swifti2v.serving.schemas import (
    CREATE_SCHEMA,
    DeletedVideo,
    ErrorBody,
    ModelList,
    ModelObject,
    VideoList,
    VideoObject,
    read_request,
    video_object,
)
from swifti2v.serving.settings import ServiceSettings  # noqa: TC001 - as above
from swifti2v.serving.uploads import IMAGE_FIELD, CreateBody, decode_picture, fetch_picture, read_body

MAX_PAGE = 100

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be used; the message says why.",
        401: "The API key is missing or wrong.",
        404: "There is no such thing (for this key).",
        429: "Too many requests, or the queue is full; see Retry-After.",
        503: "The service cannot do it for now.",
    }.items()
}
UPLOAD_PROBLEMS: dict[int | str, dict[str, Any]] = {
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "Another content type."},
}
CONTENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file; of a video at work, the fragmented MP4 as it grows, to its end.",
        "content": {"video/mp4": {}, "image/jpeg": {}},
    },
    206: {"description": "A part of it.", "content": {"video/mp4": {}, "image/jpeg": {}}},
    409: {"model": ErrorBody, "description": "It is not there yet; see Retry-After."},
    416: {"description": "The file has no such part (yet)."},
}

VideoId = Annotated[str, Path(description="The id that creating the video gave.")]


def _caller_of(request: Request) -> Caller:
    access: Access = request.app.state.service.access
    return access.caller(request)


KnownCaller = Annotated[Caller, Depends(_caller_of)]


@dataclass(frozen=True)
class Service:
    """What the routes work on."""

    settings: ServiceSettings
    queue: JobQueue
    access: Access
    draining: threading.Event
    decoder: PictureDecoder

    def describe(self, job: Job) -> VideoObject:
        """Return a job as clients see it."""
        models = self.settings.models
        # A queue shared with others may hold jobs of a model that is not served here.
        model = next((model for model in models if model.name == job.request.model), models[0])
        return video_object(job, model.defaults, max_age_seconds=self.settings.retention.max_age_seconds)

    def follow(self, look: Callable[[], Job]) -> Follow:
        """Return how to follow a job."""
        return Follow(look, self.settings.poll_seconds, self.draining.is_set)


def video_routes(service: Service) -> APIRouter:
    """Return the routes, over `service`."""
    router = APIRouter(prefix="/v1", responses=PROBLEMS)
    _add_creation(router, service)
    _add_reading(router, service)
    _add_streams(router, service)
    return router


def _add_creation(router: APIRouter, service: Service) -> None:
    limits = service.settings.limits
    pictures_at_once = threading.Semaphore(limits.concurrent_decodes)

    def submit(body: CreateBody, caller: Caller) -> Job:
        request = read_request(body.fields, service.settings)
        _check_room(service)
        body = fetch_picture(body, limits)
        with pictures_at_once:
            loaded = decode_picture(body, service.decoder)
            request = replace(request, notes=loaded.notes)
            return service.queue.submit(
                loaded.image, request, owner=caller.name, max_active_of_owner=caller.max_active_jobs
            )

    @router.post("/videos", responses=UPLOAD_PROBLEMS, openapi_extra={"requestBody": _request_body()})
    async def create_video(request: Request, caller: KnownCaller) -> VideoObject:
        """Queue a video."""
        if service.draining.is_set():
            raise ApiProblem(503, "the service is stopping; try again soon", headers={"Retry-After": "5"})
        body = await read_body(request)
        return service.describe(await to_thread.run_sync(submit, body, caller))


def _add_reading(router: APIRouter, service: Service) -> None:
    store = service.queue.store

    @router.get("/videos")
    def list_videos(
        caller: KnownCaller,
        after: Annotated[str | None, Query(max_length=100, description="Id of the last video of a page.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Annotated[Order, Query(description="By time of creation.")] = "desc",
    ) -> VideoList:
        """List the videos of this key."""
        jobs = store.list(owner=caller.sees, after=after, limit=limit + 1, order=order)
        page = [service.describe(job) for job in jobs[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return VideoList(data=page, first_id=first, last_id=last, has_more=len(jobs) > limit)

    @router.get("/videos/{video_id}")
    def retrieve_video(video_id: VideoId, caller: KnownCaller) -> VideoObject:
        """Return a video's state."""
        return service.describe(store.get(video_id, owner=caller.sees))

    @router.delete("/videos/{video_id}")
    def delete_video(video_id: VideoId, caller: KnownCaller) -> DeletedVideo:
        """Cancel a video if it is not finished (its worker stops within one step), and remove it."""
        return DeletedVideo(id=service.queue.remove(video_id, owner=caller.sees).id)

    @router.get("/models")
    def list_models(_caller: KnownCaller) -> ModelList:
        """List the models."""
        return ModelList(data=[ModelObject(id=model.name) for model in service.settings.models])


def _add_streams(router: APIRouter, service: Service) -> None:
    store = service.queue.store

    @router.get("/videos/{video_id}/content", response_class=Response, responses=CONTENT_ANSWERS)
    def download_content(
        video_id: VideoId,
        caller: KnownCaller,
        variant: Annotated[Variant, Query()] = "video",
        byte_range: Annotated[str | None, Header(alias="range")] = None,
    ) -> Response:
        """Return the video (while it is made: as it grows), its thumbnail or its spritesheet."""
        job = store.get(video_id, owner=caller.sees)
        follow = service.follow(lambda: store.get(video_id, owner=caller.sees))
        return content_response(service.queue, job, variant, byte_range=byte_range, follow=follow)

    @router.get(
        "/videos/{video_id}/events",
        response_class=Response,
        responses={200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}},
    )
    def follow_video(video_id: VideoId, caller: KnownCaller) -> Response:
        """Send the video's state at each change, until it is final."""

        def look() -> Job:
            return store.get(video_id, owner=caller.sees)

        look()
        return event_stream(service.follow(look), service.describe)


def _check_room(service: Service) -> None:
    """Refuse before the picture is decoded; the store has the last word."""
    counts = service.queue.store.counts()
    if sum(counts[state] for state in ACTIVE_STATES) >= service.queue.store.max_active:
        msg = f"the queue is full ({service.queue.store.max_active} videos wait or run); try again later"
        raise QueueFullError(msg)


def _request_body() -> dict[str, Any]:
    """Describe both forms of the body, for the OpenAPI document."""
    properties = CREATE_SCHEMA["properties"]
    file = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, ..."}
    url = {"type": "string", "description": "data:image/png;base64,..."}
    reference = {"oneOf": [url, {"type": "object", "required": ["image_url"], "properties": {"image_url": url}}]}
    forms = {"multipart/form-data": file, "application/json": reference}
    return {
        "required": True,
        "content": {
            kind: {"schema": {**CREATE_SCHEMA, "properties": {**properties, IMAGE_FIELD: picture}}}
            for kind, picture in forms.items()
        },
    }
