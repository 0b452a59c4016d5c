"""The routes of `/v1`, as OpenAI's clients call them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import Response

from swifti2v.errors import ImageInputError
from swifti2v.jobs.queue import JobQueue  # noqa: TC001 - FastAPI and dataclasses read annotations as they run
from swifti2v.jobs.store import Order  # noqa: TC001 - as above
from swifti2v.serving.content import Follow, Variant, content_response, event_stream
from swifti2v.serving.decoding import PictureDecoder, PictureTooLargeError
from swifti2v.serving.keys import Access, Caller
from swifti2v.serving.problems import ApiProblem, ErrorBody
from swifti2v.serving.schemas import (
    PICTURE_FIELD,
    DeletedVideo,
    ModelList,
    ModelObject,
    VideoList,
    VideoObject,
    VideoRequest,
    job_request,
    read_request,
    video_object,
)
from swifti2v.serving.settings import ServiceSettings  # noqa: TC001 - as above
from swifti2v.serving.uploads import picture_bytes, read_fields

if TYPE_CHECKING:
    from swifti2v.jobs.state import Job

MAX_PAGE = 100


def _problems(**texts: str) -> dict[int | str, dict[str, Any]]:
    return {int(status[1:]): {"model": ErrorBody, "description": text} for status, text in texts.items()}


PROBLEMS = _problems(
    _400="The request cannot be used; the message says why.",
    _401="The API key is missing or wrong.",
    _404="There is no such thing (for this key).",
    _429="Too many requests, or the queue is full; see Retry-After.",
    _503="The service cannot do it for now.",
)
UPLOAD_PROBLEMS = _problems(
    _408="The body came too slowly.", _413="The body is too large.", _415="Another content type."
)
_FILES: dict[str, Any] = {"video/mp4": {}, "image/jpeg": {}}
CONTENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file; of a video at work, the fragmented MP4 as it grows, to its end.",
        "content": _FILES,
    },
    206: {"description": "A part of it.", "content": _FILES},
    416: {"description": "The file has no such part (yet)."},
    **_problems(_409="It is not there yet; see Retry-After."),
}
EVENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}
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

    def submit(fields: dict[str, Any], caller: Caller) -> Job:
        asked = read_request(fields)
        request = job_request(asked, service.settings)
        service.queue.store.check_room()  # before the picture is decoded; the submission has the last word
        content = picture_bytes(asked.input_reference, limits)
        with pictures_at_once:
            try:
                loaded = service.decoder.decode(content)
            except ImageInputError as error:
                code = "image_too_large" if isinstance(error, PictureTooLargeError) else "invalid_image"
                raise ApiProblem(400, str(error), param=PICTURE_FIELD, code=code) from error
            request = replace(request, notes=loaded.notes)
            limit = caller.max_active_jobs
            return service.queue.submit(loaded.image, request, owner=caller.name, max_active_of_owner=limit)

    @router.post("/videos", responses=UPLOAD_PROBLEMS, openapi_extra={"requestBody": _request_body()})
    async def create_video(request: Request, caller: KnownCaller) -> VideoObject:
        """Queue a video."""
        if service.draining.is_set():
            raise ApiProblem(503, "the service is stopping; try again soon", headers={"Retry-After": "5"})
        fields = await read_fields(request)
        return service.describe(await to_thread.run_sync(submit, fields, caller))


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
    def followed(video_id: str, caller: Caller) -> tuple[Job, Follow]:
        follow = service.follow(lambda: service.queue.store.get(video_id, owner=caller.sees))
        return follow.look(), follow

    @router.get("/videos/{video_id}/content", response_class=Response, responses=CONTENT_ANSWERS)
    def download_content(
        video_id: VideoId,
        caller: KnownCaller,
        variant: Annotated[Variant, Query()] = "video",
        byte_range: Annotated[str | None, Header(alias="range")] = None,
    ) -> Response:
        """Return the video (while it is made: as it grows), its thumbnail or its spritesheet."""
        job, follow = followed(video_id, caller)
        return content_response(service.queue, job, variant, byte_range=byte_range, follow=follow)

    @router.get("/videos/{video_id}/events", response_class=Response, responses=EVENT_ANSWERS)
    def follow_video(video_id: VideoId, caller: KnownCaller) -> Response:
        """Send the video's state at each change, until it is final."""
        return event_stream(followed(video_id, caller)[1], service.describe)


def _request_body() -> dict[str, Any]:
    """Describe both forms of the body, for the OpenAPI document."""
    schema = VideoRequest.model_json_schema()
    schema.pop("$defs")
    file = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, ..."}
    url = {"type": "string", "description": "data:image/png;base64,..."}
    reference = {"oneOf": [url, {"type": "object", "required": ["image_url"], "properties": {"image_url": url}}]}
    forms = {"multipart/form-data": file, "application/json": reference}
    content = {
        kind: {"schema": schema | {"properties": schema["properties"] | {PICTURE_FIELD: picture}}}
        for kind, picture in forms.items()
    }
    return {"required": True, "content": content}
