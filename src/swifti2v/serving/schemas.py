"""The objects of `/v1/videos`, as OpenAI's clients know them, with a few fields more."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.jobs.state import Job, JobRequest, JobState
from swifti2v.serving.problems import ApiProblem
from swifti2v.settings import MAX_PROMPT_CHARACTERS, OPTIONS, GenerationSettings, plain_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from swifti2v.serving.settings import ServedModel, ServiceLimits, ServiceSettings


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video: OpenAI's fields, and after them ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
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


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


CREATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt", "input_reference"],
    "additionalProperties": False,
    "properties": {
        "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
        "model": {"type": "string"},
        "size": {"type": "string", "description": "WIDTHxHEIGHT, multiples of 32", "example": "1280x704"},
        "seconds": {"type": "number", "description": "rounded to whole latent frames"},
        "num_frames": {"type": "integer", "description": "4k+1, instead of seconds"},
        "fps": {"type": "number"},
        "seed": {"type": "integer", "minimum": 0},
        "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
        "num_inference_steps": {"type": "integer", "minimum": 1},
        "guidance_scale": {"type": "number", "minimum": 1},
        "stage_one_steps": {"type": "integer", "minimum": 1},
        "stage_one_guidance_scale": {"type": "number", "minimum": 1},
        "stage_one_guidance_scale_2": {"type": "number", "minimum": 1, "description": "of the low-noise expert"},
        "stage_one_flow_shift": {"type": "number", "description": "of a service of many steps"},
    },
}
"""Of the body that creates a video, without the picture, which has another form in each content type."""


def read_request(fields: Mapping[str, Any], settings: ServiceSettings) -> JobRequest:
    """Return the job that the fields of a request ask for; every choice is settled, and fits the limits.

    Raises:
        ApiProblem: a field is unknown, missing or has a value that cannot be used.
    """
    unknown = sorted(set(fields) - set(CREATE_SCHEMA["properties"]))
    if unknown:
        known = ", ".join(CREATE_SCHEMA["properties"])
        raise ApiProblem(400, f"{unknown[0][:60]!r} is no field; the fields are {known}", param=unknown[0][:60])
    given = {name: value for name, value in fields.items() if value is not None}
    if "prompt" not in given:
        raise ApiProblem(400, "prompt is missing; say what should move, and how", param="prompt")
    values = {name: _READERS[name](name, value) for name, value in given.items()}
    model = _model(values.get("model"), settings)
    try:
        settled = _settled(values, model.defaults)
    except InvalidInputError as error:
        raise ApiProblem(
            400, str(error), param=error.param if error.param in values else None, code="invalid_value"
        ) from error
    _check_limits(settled, settings.limits)
    return JobRequest(model.name, values["prompt"], plain_choices(_choices(settled, values)))


def video_object(job: Job, defaults: GenerationSettings, *, max_age_seconds: float | None) -> VideoObject:
    """Return a job as a client sees it; `defaults` are its model's, for what whoever queued it left open."""
    chosen = {name: value for name, value in job.request.options.items() if value is not None}
    num_frames, fps = chosen.get("num_frames", defaults.num_frames), chosen.get("fps", defaults.fps)
    ended = job.finished_at if job.state is JobState.COMPLETED else None
    expires = None if job.finished_at is None or max_age_seconds is None else int(job.finished_at + max_age_seconds)
    notes = job.request.notes if job.result is None else job.result.notes
    return VideoObject(
        id=job.id,
        model=job.request.model,
        status=_status(job.state),
        progress=job.progress.percent,
        created_at=int(job.created_at),
        completed_at=None if ended is None else int(ended),
        expires_at=expires,
        size=str(Size(*chosen.get("size", defaults.size))),
        seconds=f"{num_frames / fps:.4g}",
        prompt=job.request.prompt,
        error=_video_error(job),
        num_frames=num_frames,
        fps=fps,
        seed=chosen.get("seed", defaults.seed),
        phase=job.progress.phase,
        segment=job.progress.segment,
        num_segments=job.progress.num_segments,
        notes=list(notes),
    )


def _status(state: JobState) -> Literal["queued", "in_progress", "completed", "failed"]:
    # OpenAI's clients know four: a cancelled video has failed, and its error says why.
    status: Literal["queued", "in_progress", "completed", "failed"] = "failed"
    if state is JobState.QUEUED:
        status = "queued"
    elif state is JobState.IN_PROGRESS:
        status = "in_progress"
    elif state is JobState.COMPLETED:
        status = "completed"
    return status


def _video_error(job: Job) -> VideoError | None:
    if job.state is JobState.CANCELLED:
        return VideoError(code="cancelled", message="the video was cancelled")
    if job.failure is None:
        return None
    if job.failure.code == "invalid_input":
        return VideoError(code=job.failure.code, message="picture, prompt or options cannot be used")
    # The message may name paths and cards of the machine: it is for the operator, in the log of the worker.
    return VideoError(code=job.failure.code, message="the video could not be made; try again, or ask the operator")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ApiProblem(400, f"{name} is not text", param=name)
    if len(value) > MAX_PROMPT_CHARACTERS:
        message = f"{name} has {len(value)} characters; shorten it to at most {MAX_PROMPT_CHARACTERS}"
        raise ApiProblem(400, message, param=name, code="string_above_max_length")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiProblem(400, f"{name} holds half of a character", param=name) from error
    if "\0" in value:
        raise ApiProblem(400, f"{name} holds a character that text may not have (NUL)", param=name)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63:  # not NaN either
        return float(value)
    raise ApiProblem(400, f"{name} is not a number that can be used", param=name)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ApiProblem(400, f"{name} is not a whole number", param=name)


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "model": _text,
    "size": _text,
    "seconds": _number,
    "num_frames": _integer,
    "fps": _number,
    "seed": _integer,
    "negative_prompt": _text,
    "num_inference_steps": _integer,
    "guidance_scale": _number,
    "stage_one_steps": _integer,
    "stage_one_guidance_scale": _number,
    "stage_one_guidance_scale_2": _number,
    "stage_one_flow_shift": _number,
}


def _model(name: str | None, settings: ServiceSettings) -> ServedModel:
    if name is None:
        return settings.models[0]
    for model in settings.models:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in settings.models)
    raise ApiProblem(404, f"there is no model {name[:60]!r}; use {known}", param="model", code="model_not_found")


def _settled(values: Mapping[str, Any], defaults: GenerationSettings) -> GenerationSettings:
    if "seconds" in values and "num_frames" in values:
        raise ApiProblem(400, "seconds and num_frames are both given; give one", param="num_frames")
    settled = defaults.settled({name: value for name, value in values.items() if name in OPTIONS})
    if "seconds" not in values:
        return settled
    temporal = CodecGeometry().temporal
    latent_frames = max(1, round(values["seconds"] * settled.fps / temporal))
    return replace(settled, num_frames=latent_frames * temporal + 1)


def _choices(settled: GenerationSettings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what was chosen, and what tells the client what will come; the rest stays the checkpoint's choice."""
    told = ("size", "num_frames", "fps", "seed")
    kept = {name: value for name, value in values.items() if name in OPTIONS}
    return kept | {name: getattr(settled, name) for name in told}


def _check_limits(settled: GenerationSettings, limits: ServiceLimits) -> None:
    if settled.size.width * settled.size.height > limits.max_video_pixels:
        message = f"size {settled.size} is more than this service makes; {limits.max_video_pixels} pixels are the limit"
        raise ApiProblem(400, message, param="size", code="invalid_value")
    if settled.num_frames > limits.max_num_frames:
        message = f"{settled.num_frames} frames are more than this service makes; {limits.max_num_frames} are the limit"
        raise ApiProblem(400, message, param="num_frames", code="invalid_value")
