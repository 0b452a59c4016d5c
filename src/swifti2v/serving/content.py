"""The files of a video (whole ones with HTTP ranges, and the one that still grows), and its progress as events."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

from anyio import to_thread
from starlette.responses import FileResponse, Response, StreamingResponse

from swifti2v.errors import JobError
from swifti2v.jobs.state import Job, JobState
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

    from swifti2v.jobs.files import AttemptFiles
    from swifti2v.jobs.queue import JobQueue
    from swifti2v.serving.schemas import VideoObject

Variant = Literal["video", "thumbnail", "spritesheet"]

KEEPALIVE_SECONDS = 15.0
"""Send a comment after this much silence, so that proxies keep the connection open."""

PIECE_BYTES = 1 << 16
_HEADERS = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


@dataclass(frozen=True)
class Follow:
    """How a job is followed: `look` returns it as it is now (`JobError` if it is gone), every `poll_seconds`."""

    look: Callable[[], Job]
    poll_seconds: float
    is_draining: Callable[[], bool]


def content_response(
    queue: JobQueue, job: Job, variant: Variant, *, byte_range: str | None, follow: Follow
) -> Response:
    """Return the response with a file of `job`.

    Raises:
        ApiProblem: there is no such file (yet).
    """
    files = queue.result_files(job)
    if job.state.is_final and job.state is not JobState.COMPLETED:
        raise ApiProblem(404, "the video was not made: there is nothing to download", code="video_failed")
    if files is None:
        raise _not_ready("the video waits in the queue")
    if variant != "video":
        path = files.thumbnail if variant == "thumbnail" else files.spritesheet
        return _whole(path, "image/jpeg", f"{job.id}-{variant}.jpg")
    if job.state is JobState.COMPLETED:
        return _whole(files.video, "video/mp4", f"{job.id}.mp4")
    span = _RANGE.fullmatch(byte_range or "")
    if span is not None and (span[1] != "0" or span[2]):
        return _part(files.growing_video, int(span[1]), int(span[2]) if span[2] else None)
    return GrowingVideo(files, job, follow)


class GrowingVideo(Response):
    """The video of a job at work, sent as it grows, to its end.

    If the job does not come to its end (cancelled, failed, taken over by another worker), the connection is closed
    without the mark that ends a response, so that no client takes the piece for the whole.
    """

    media_type = "video/mp4"

    def __init__(self, files: AttemptFiles, job: Job, follow: Follow) -> None:
        super().__init__(headers=_HEADERS | {"Accept-Ranges": "bytes", "X-Video-Status": "in_progress"})
        del self.headers["content-length"]
        self._files = files
        self._claims = job.claims
        self._follow = follow

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file until it is whole or the client has gone."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            if await self._send_all(send, gone):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()

    async def _send_all(self, send: Send, gone: asyncio.Task[None]) -> bool:
        """Return whether all of the video was sent."""
        file: BinaryIO | None = None
        try:
            while not gone.done():
                # The state is read before the bytes: what is written before the final state is then read as well.
                state = await to_thread.run_sync(self._state)
                file = file or await to_thread.run_sync(self._open, state)
                if file is not None:
                    await _send_rest(file, send)
                if state is not JobState.IN_PROGRESS or self._follow.is_draining():
                    return state is JobState.COMPLETED and file is not None
                await asyncio.sleep(self._follow.poll_seconds)
            return False
        finally:
            if file is not None:
                file.close()

    def _state(self) -> JobState:
        try:
            job = self._follow.look()
        except JobError:
            return JobState.CANCELLED
        return job.state if job.claims == self._claims else JobState.QUEUED

    def _open(self, state: JobState) -> BinaryIO | None:
        """Open the growing file, or the finished one if it has been renamed already."""
        paths = [self._files.growing_video]
        if state is JobState.COMPLETED:
            paths.append(self._files.video)
        for path in paths:
            try:
                return path.open("rb")
            except FileNotFoundError:
                continue
        return None


def event_stream(follow: Follow, describe: Callable[[Job], VideoObject]) -> StreamingResponse:
    """Return a response that sends ``video.progress`` at each change and ends after the final state.

    The last event is ``video.completed``, ``video.failed``, or ``video.deleted`` without data. Data is the video.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(follow, describe), media_type="text/event-stream", headers=headers)


async def _events(follow: Follow, describe: Callable[[Job], VideoObject]) -> AsyncIterator[str]:
    last, silent_since = "", time.monotonic()
    while not follow.is_draining():
        try:
            job = await to_thread.run_sync(follow.look)
        except JobError:
            yield "event: video.deleted\ndata: {}\n\n"
            return
        video = describe(job)
        data = video.model_dump_json()
        if job.state.is_final:
            yield f"event: video.{video.status}\ndata: {data}\n\n"
            return
        if data != last:
            last, silent_since = data, time.monotonic()
            yield f"event: video.progress\ndata: {data}\n\n"
        elif time.monotonic() - silent_since > KEEPALIVE_SECONDS:
            silent_since = time.monotonic()
            yield ": waiting\n\n"
        await asyncio.sleep(follow.poll_seconds)


def _whole(path: Path, media_type: str, name: str) -> Response:
    try:
        status = path.stat()
    except OSError:
        raise _not_ready("this file is not there yet") from None
    return FileResponse(
        path,
        media_type=media_type,
        filename=name,
        stat_result=status,
        content_disposition_type="inline",
        headers=_HEADERS,
    )


def _part(path: Path, start: int, stop: int | None) -> Response:
    """Return the bytes of the growing file that are there; its length is not known yet."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(min(start, size))
            wanted = size - start if stop is None else stop + 1 - start
            content = file.read(max(0, min(wanted, 64 * PIECE_BYTES)))
    except OSError:
        raise _not_ready("the video has no bytes yet") from None
    if not content:
        raise ApiProblem(416, "the video has not grown so far yet", headers={"Content-Range": f"bytes */{size}"})
    span = f"bytes {start}-{start + len(content) - 1}/*"
    return Response(content, 206, headers=_HEADERS | {"Content-Range": span}, media_type="video/mp4")


def _not_ready(why: str) -> ApiProblem:
    return ApiProblem(409, f"{why}; try again soon", code="video_not_ready", headers={"Retry-After": "1"})


async def _send_rest(file: BinaryIO, send: Send) -> None:
    while piece := await to_thread.run_sync(file.read, PIECE_BYTES):
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _wait_for_disconnect(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return
