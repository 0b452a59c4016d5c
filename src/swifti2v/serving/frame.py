"""ASGI middleware around every request: id, limits, log line, metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

from swifti2v.jobs.logs import REQUEST_FIELDS
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from swifti2v.serving.metrics import Metrics
    from swifti2v.serving.settings import ServiceLimits

ACCESS_LOGGER = logging.getLogger("swifti2v.serving.access")
REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RequestFrame:
    """Middleware around the application, which a proxy may offer below `root_path`, with or without that in paths."""

    def __init__(self, app: ASGIApp, *, limits: ServiceLimits, metrics: Metrics, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path or scope.get("root_path", "")
        request_id = _request_id(scope)
        body = _BoundedBody(receive, self._limits)
        status = 500
        started = time.perf_counter()

        async def framed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, body.receive, framed_send)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.observe(route, scope["method"], status, seconds)
            # The path as the route has it: what a client wrote into it stays out of the log.
            milliseconds, key = round(1000 * seconds, 1), scope.get("key_name", "")
            values = (request_id, scope["method"], route, status, milliseconds, key, body.num_bytes)
            ACCESS_LOGGER.info("request", extra=dict(zip(REQUEST_FIELDS, values, strict=True)))


class _BoundedBody:
    """The body of a request, with limits of size and time."""

    def __init__(self, receive: Receive, limits: ServiceLimits) -> None:
        self._receive = receive
        self._limits = limits
        self._deadline: float | None = None
        self._ended = False
        self.num_bytes = 0

    async def receive(self) -> Message:
        """Return the next piece.

        Raises:
            ApiProblem: the body is too large, or too slow.
        """
        if self._ended:  # what comes now is the end of the connection
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._limits.upload_seconds
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - loop.time())
        except TimeoutError as error:
            message_text = f"the body did not arrive within {self._limits.upload_seconds:g} s"
            raise ApiProblem(408, message_text, headers={"Connection": "close"}) from error
        self.num_bytes += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self.num_bytes > self._limits.max_upload_bytes:
            megabytes = self._limits.max_upload_bytes / (1 << 20)
            message_text = f"the body is larger than {megabytes:g} MiB; send a smaller picture"
            raise ApiProblem(413, message_text, headers={"Connection": "close"})
        return message


def _request_id(scope: Scope) -> str:
    """Return the request id that the client sent if it is safe to log, else a new one."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER.encode():
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return str(text)
    return f"req_{secrets.token_hex(12)}"
