"""Server-sent events: a video's progress, pushed as it changes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi.responses import StreamingResponse

from swifti2v.errors import JobError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from swifti2v.jobs.state import Job
    from swifti2v.serving.content import Follow
    from swifti2v.serving.schemas import VideoObject

KEEPALIVE_SECONDS = 15.0
"""A comment is sent after so much silence, so that proxies keep the connection."""


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
