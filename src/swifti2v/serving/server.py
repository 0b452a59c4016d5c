"""uvicorn in this process, with limits on connections and on the time for a request's head."""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio
    import threading

    from fastapi import FastAPI

    from swifti2v.serving.settings import ServiceLimits

KEEP_ALIVE_SECONDS = 15
SHUTDOWN_SECONDS = 15
_SPARE_FILES = 256  # beside the connections: the database, videos that are sent


class DrainingServer(uvicorn.Server):
    """A server that sets `draining` as soon as it is told to stop; SIGTERM then ends `run` as it ends any function."""

    def __init__(self, config: uvicorn.Config, draining: threading.Event) -> None:
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Set the event, then stop as uvicorn does."""
        self._draining.set()
        super().handle_exit(sig, frame)


def server_for(app: FastAPI, address: tuple[str, int], *, limits: ServiceLimits, draining: threading.Event) -> Any:
    """Return the server of `app` at (host, port), to be `run`."""

    class Protocol(ImpatientProtocol):
        header_seconds = limits.header_seconds

    config = uvicorn.Config(
        app,
        host=address[0],
        port=address[1],
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    _allow_open_files(limits.max_connections + _SPARE_FILES)
    return DrainingServer(config, draining)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no whole head of a request arrives in time.

    uvicorn itself has a time limit between requests, but none before the first one, nor within a head.
    """

    header_seconds = 15.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        at_work = self.cycle is not None and not self.cycle.response_complete
        if at_work or self.timeout_keep_alive_task is not None:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, up to what the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
