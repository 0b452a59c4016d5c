"""The objects of `/v1/videos`, as OpenAI's clients know them, with a few fields more."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry
from swifti2v.jobs.state import Job, JobRequest, JobState
from swifti2v.serving.problems import ApiProblem, invalid_field
from swifti2v.settings import MAX_PROMPT_CHARACTERS, GenerationSettings, plain_choices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.serving.settings import ServedModel, ServiceSettings

CHOICES = (
    "size",
    "num_frames",
    "fps",
    "seed",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "stage_one_steps",
    "stage_one_guidance_scale",
    "stage_one_guidance_scale_2",
    "stage_one_flow_shift",
)
"""Settings that a request may choose, as `GenerationSettings` describes them. What decides which networks are loaded,
and how much memory a window takes, is the operator's."""

TOLD = ("size", "num_frames", "fps", "seed")
"""Settings that every answer shows."""

PICTURE_FIELD = "input_reference"
MAX_SECONDS = 3600.0


Status = Literal["queued", "in_progress", "completed", "failed"]

_STATUSES: Mapping[JobState, Status] = {
    JobState.QUEUED: "queued",
    JobState.IN_PROGRESS: "in_progress",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",  # OpenAI's clients know no more states; the video's error says why
}


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video: OpenAI's fields, and after them ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    size: str
    seconds: str
    prompt: str | None = None
    error: VideoError | None = None
    remixed_from_video_id: str | None = None
    num_frames: int
    fps: float
    seed: int
    phase: str = ""
    segment: int = 0
    num_segments: int = 0
    notes: list[str] = []


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelObject(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "swifti2v"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def _without_nul(text: str) -> str:
    if "\0" in text:
        msg = "text holds a character that it may not have (NUL)"
        raise ValueError(msg)
    return text


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_without_nul)]


class PictureLink(BaseModel):
    """A picture by its address, as OpenAI's clients write it."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(description="data:image/png;base64,..., or https of a host that the operator allows")


class _Asked(BaseModel):
    """What a request says beside the choices."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    model: Text | None = None
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)] | None = Field(
        None, description="Instead of num_frames; rounded to whole latent frames."
    )
    input_reference: bytes | PictureLink | str = Field(description="The picture: a file in a form, a data URL in JSON.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic would take for 0 or 1
            msg = "give a number or text, not true or false"
            raise ValueError(msg)
        return value

    @field_validator("negative_prompt", check_fields=False)
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        return value and _without_nul(value)


_HINTS = get_type_hints(GenerationSettings, include_extras=True)

_CHOSEN: dict[str, Any] = {name: (_HINTS[name] | None, None) for name in CHOICES}

VideoRequest: Any = create_model("VideoRequest", __base__=_Asked, **_CHOSEN)
"""The body that creates a video. A field of a form is text, in JSON a number may be text as well."""


def read_request(fields: Mapping[str, Any]) -> Any:
    """Return the `VideoRequest` of a body.

    Raises:
        ApiProblem: a field is unknown, missing or has a value that cannot be used.
    """
    try:
        return VideoRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_field(error.errors(include_url=False)[0]) from error


def job_request(asked: Any, settings: ServiceSettings) -> JobRequest:
    """Return the job that a `VideoRequest` asks for; every choice fits the model and the limits of the service.

    Raises:
        ApiProblem: there is no such model, or seconds and frames are both given.
        InvalidInputError: choices that do not go together, or are more than the service makes.
    """
    model = _model(asked.model, settings)
    if asked.seconds is not None and asked.num_frames is not None:
        raise ApiProblem(400, "seconds and num_frames are both given; give one", param="num_frames")
    chosen = {name: value for name in CHOICES if (value := getattr(asked, name)) is not None}
    settled = model.defaults.settled(chosen)
    if asked.seconds is not None:
        temporal = CodecGeometry().temporal
        latent_frames = max(1, round(asked.seconds * settled.fps / temporal))
        settled = replace(settled, num_frames=latent_frames * temporal + 1)
    limits = settings.limits
    if settled.size.width * settled.size.height > limits.max_video_pixels:
        msg = f"size {settled.size} is more than this service makes; {limits.max_video_pixels} pixels are the limit"
        raise InvalidInputError(msg, param="size", value=settled.size)
    if settled.num_frames > limits.max_num_frames:
        msg = f"{settled.num_frames} frames are more than this service makes; {limits.max_num_frames} are the limit"
        param = "num_frames" if asked.seconds is None else "seconds"
        raise InvalidInputError(msg, param=param, value=settled.num_frames)
    # Settled is what tells the client what will come; the rest stays the checkpoint's choice.
    told = {name: getattr(settled, name) for name in TOLD}
    return JobRequest(model.name, asked.prompt, plain_choices(chosen | told))


def data_url_bytes(url: str) -> bytes:
    """Return what a data URL holds; raise `InvalidInputError` if it is not one of base64."""
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise binascii.Error
        return base64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error is one
        msg = "the data URL is not of the form data:image/png;base64,..."
        raise InvalidInputError(msg, param=PICTURE_FIELD) from error


def video_object(job: Job, defaults: GenerationSettings, *, max_age_seconds: float | None) -> VideoObject:
    """Return a job as a client sees it; `defaults` are its model's, for what whoever queued it left open."""
    settled = defaults.settled({name: job.request.options.get(name) for name in TOLD})
    completed = job.finished_at if job.state is JobState.COMPLETED else None
    expires = None if job.finished_at is None or max_age_seconds is None else int(job.finished_at + max_age_seconds)
    return VideoObject(
        id=job.id,
        model=job.request.model,
        status=_STATUSES[job.state],
        progress=job.progress.percent,
        created_at=int(job.created_at),
        completed_at=None if completed is None else int(completed),
        expires_at=expires,
        size=str(settled.size),
        seconds=f"{settled.num_frames / settled.fps:.4g}",
        prompt=job.request.prompt,
        error=_video_error(job),
        num_frames=settled.num_frames,
        fps=settled.fps,
        seed=settled.seed,
        phase=job.progress.phase,
        segment=job.progress.segment,
        num_segments=job.progress.num_segments,
        notes=list(job.request.notes if job.result is None else job.result.notes),
    )


def _video_error(job: Job) -> VideoError | None:
    if job.state is JobState.CANCELLED:
        return VideoError(code="cancelled", message="the video was cancelled")
    if job.failure is None:
        return None
    if job.failure.code == "invalid_input":
        return VideoError(code=job.failure.code, message="picture, prompt or options cannot be used")
    # The message may name paths and cards of the machine: it is for the operator, in the log of the worker.
    return VideoError(code=job.failure.code, message="the video could not be made; try again, or ask the operator")


def _model(name: str | None, settings: ServiceSettings) -> ServedModel:
    for model in settings.models:
        if name in (None, model.name):
            return model
    known = ", ".join(model.name for model in settings.models)
    raise ApiProblem(404, f"there is no model {name!r:.60}; use {known}", param="model", code="model_not_found")
