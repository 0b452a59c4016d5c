"""Errors as HTTP responses, in the shape of OpenAI's: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from swifti2v.errors import InvalidInputError, JobError, OutputError, QueueFullError, SwiftI2VError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

LOGGER = logging.getLogger(__name__)

MAX_ECHO_CHARACTERS = 60
"""Limit of what an answer repeats of a client's text."""

_RETRY_LATER = {"Retry-After": "5"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ApiProblem(Exception):  # noqa: N818 - an answer to a client, not an error of this package
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one line for people.
        param: the field of the request that it is about.
        code: for programs; default: by the status.
        headers: to be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code or _CODES.get(status))

    @property
    def response(self) -> JSONResponse:
        """The response that says it."""
        return JSONResponse(ErrorBody(error=self.detail).model_dump(), self.status, headers=self.headers)


def invalid_field(error: Mapping[str, Any]) -> ApiProblem:
    """Return the problem with one field, as pydantic describes it (`ValidationError.errors`)."""
    place = error["loc"][1:] if error["loc"][:1] in (("query",), ("path",), ("header",)) else ()
    names = [str(part)[:MAX_ECHO_CHARACTERS] for part in place or error["loc"]]
    param = names[0] if names else None  # without one, a key is not even text
    cause = error.get("ctx", {}).get("error")  # the exception of a validator of ours
    said = {"missing": "is missing", "extra_forbidden": "is not a known field; see /docs"}
    message = str(cause or f"{param or 'a field'}: {said.get(error['type'], error['msg'])}")
    return ApiProblem(400, message, param=param, code="invalid_value")


def as_problem(error: Exception) -> ApiProblem:
    """Return what a client may know of an error: never a path, never a traceback."""
    match error:
        case ApiProblem():
            return error
        case JobError():
            return ApiProblem(404, "there is no such video; it may have expired")
        case QueueFullError():
            return ApiProblem(429, str(error), code="queue_full", headers=_RETRY_LATER)
        case InvalidInputError():
            return ApiProblem(400, str(error), param=error.param, code="invalid_value")
        case OutputError():
            message = "the service cannot store this for now; try again later"
            return ApiProblem(503, message, code="storage", headers=_RETRY_LATER)
        case RequestValidationError():
            return invalid_field(error.errors()[0])
        case HTTPException():
            return ApiProblem(error.status_code, str(error.detail), headers=error.headers)
    return ApiProblem(500, "the service failed; give the operator the x-request-id of this response")


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in this shape."""

    def handle(_request: Request, error: Exception) -> JSONResponse:
        problem = as_problem(error)
        if problem.status >= 500:
            LOGGER.error("%s: %s", type(error).__name__, error, exc_info=problem.status == 500)
        return problem.response

    for kind in (ApiProblem, SwiftI2VError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
