"""Errors as HTTP responses, in the shape of OpenAI's: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from swifti2v.errors import InvalidInputError, JobError, OutputError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

LOGGER = logging.getLogger(__name__)

_RETRY_SECONDS = 5

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


class ApiProblem(Exception):  # noqa: N818 - an answer to a client, not an error of this package
    """A request that cannot be answered as wished.

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
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})


def problem_body(problem: ApiProblem) -> dict[str, Any]:
    """Return OpenAI's error object."""
    default = "server_error" if problem.status >= 500 else "invalid_request_error"
    kind = _TYPES.get(problem.status, default)
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}}


def problem_response(problem: ApiProblem) -> JSONResponse:
    """Return the response that says it."""
    return JSONResponse(problem_body(problem), problem.status, headers=problem.headers)


def as_problem(error: Exception) -> ApiProblem:
    """Return what a client may know of an error: never a path, never a traceback."""
    if isinstance(error, ApiProblem):
        return error
    if isinstance(error, JobError):
        return ApiProblem(404, "there is no such video; it may have expired")
    if isinstance(error, QueueFullError):
        return ApiProblem(429, str(error), code="queue_full", headers={"Retry-After": str(_RETRY_SECONDS)})
    if isinstance(error, InvalidInputError):
        return ApiProblem(400, str(error), code="invalid_value")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return ApiProblem(400, str(first.get("msg", "invalid")), param=str(first["loc"][-1]), code="invalid_value")
    if isinstance(error, HTTPException):
        return ApiProblem(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, OutputError):
        headers = {"Retry-After": str(_RETRY_SECONDS)}
        return ApiProblem(
            503, "the service cannot store this for now; try again later", code="storage", headers=headers
        )
    return ApiProblem(500, "the service failed; give the operator the x-request-id of this response")


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in this shape."""

    def handle(_request: Request, error: Exception) -> JSONResponse:
        problem = as_problem(error)
        if problem.status >= 500:
            LOGGER.error("%s: %s", type(error).__name__, error, exc_info=problem.status == 500)
        return problem_response(problem)

    kinds = (
        ApiProblem,
        JobError,
        QueueFullError,
        InvalidInputError,
        RequestValidationError,
        HTTPException,
        OutputError,
    )
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, handle)
