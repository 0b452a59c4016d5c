"""The files of jobs over HTTP, and the rules that keep a page to this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from swifti2v.errors import JobError
from swifti2v.webapp.views import KINDS, MEDIA_PATH, media_file, playable_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from swifti2v.jobs.queue import JobQueue

CONTENT_TYPES = {"input": "image/png", "thumbnail": "image/jpeg"}
_VIDEO_TYPE = "video/mp4"
_CHUNK_BYTES = 1 << 18

POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio evaluates the templates of its components as they come.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    )
)
"""What a page may load: things of this server only, so that nothing is asked of the network."""


def media_route(queue: JobQueue) -> Route:
    """Return the route of a job's files: ``/media/<job>/<kind>``, with ``?download=NAME`` to be saved."""

    def media(request: Request) -> Response:
        kind = request.path_params["kind"]
        try:
            path = media_file(queue, request.path_params["job"], kind) if kind in KINDS else None
            if path is None and kind == "growing":  # it was finished between the look at the job and this question
                kind, path = "video", media_file(queue, request.path_params["job"], "video")
        except JobError as error:
            return PlainTextResponse(str(error), status_code=404)
        if path is None:
            return PlainTextResponse("there is no such file (yet); look at the job in the app", status_code=404)
        if kind == "growing":
            return _growing(path)
        name = f"swifti2v_{request.path_params['job'][6:14]}.mp4" if "download" in request.query_params else None
        return FileResponse(path, media_type=CONTENT_TYPES.get(kind, _VIDEO_TYPE), filename=name)

    return Route(f"/{MEDIA_PATH}/{{job}}/{{kind}}", media, methods=["GET", "HEAD"], name="media")


class ContentPolicy:
    """Middleware that sends `POLICY` with every page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and add the headers to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _growing(path: Path) -> Response:
    """Return what can be played of a video at work; the file may grow while it is sent."""
    try:
        length = playable_bytes(path)
        file = path.open("rb")  # now, for it takes another name when it is finished
    except FileNotFoundError:
        length = 0
    if length == 0:
        return PlainTextResponse("there is nothing to play yet; ask again soon", status_code=404)

    def pieces() -> Iterator[bytes]:
        left = length
        with file:
            while left and (piece := file.read(min(left, _CHUNK_BYTES))):
                left -= len(piece)
                yield piece

    headers = {"Content-Length": str(length), "Cache-Control": "no-store"}
    return StreamingResponse(pieces(), media_type=_VIDEO_TYPE, headers=headers)
