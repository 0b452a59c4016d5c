"""The HTTP server: silent and dripping connections are closed, those at work are not, and there is room for many."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from swifti2v.serving.server import server_for
from swifti2v.serving.settings import ServiceLimits
from tests.jobs.conftest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_SECONDS = 0.5


@pytest.fixture
def port() -> Iterator[int]:
    """A server of an application with a quick and a slow answer."""
    app = FastAPI()

    @app.get("/quick")
    def quick() -> str:
        return "done"

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(3 * HEADER_SECONDS)
        return "done"

    limits = ServiceLimits(header_seconds=HEADER_SECONDS, max_connections=30)
    draining = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    server = server_for(app, ("127.0.0.1", 0), limits=limits, draining=draining)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_for(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def connect(port: int) -> Any:
    return closing(socket.create_connection(("127.0.0.1", port), timeout=30))


def closed_after(connection: socket.socket) -> float:
    """Return how many seconds it took the server to close the connection."""
    started = time.monotonic()
    while connection.recv(1000):
        pass
    return time.monotonic() - started


def received_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what the server sends up to `end`: head and body need not come in one piece."""
    answer = b""
    while not answer.endswith(end):
        piece = connection.recv(1000)
        assert piece, f"the server closed the connection after {answer!r}"
        answer += piece
    return answer


def test_a_silent_connection_is_closed(port: int) -> None:
    with connect(port) as connection:
        assert closed_after(connection) >= 0.9 * HEADER_SECONDS


def test_a_head_that_drips_is_not_waited_for(port: int) -> None:
    """Each byte comes in good time, the head as a whole does not."""
    with connect(port) as connection:
        connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\nX-Long: ")
        started = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012 - it breaks off somewhere in between
            while time.monotonic() - started < 30:
                connection.sendall(b"x")
                time.sleep(HEADER_SECONDS / 10)
        assert time.monotonic() - started >= 0.9 * HEADER_SECONDS


def test_an_answer_that_takes_longer_is_waited_for(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := connection.recv(1000):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b'"done"')


def test_a_connection_is_kept_for_the_next_request_but_not_for_half_of_one(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n")
            assert received_until(connection, b'"done"').startswith(b"HTTP/1.1 200 OK")
            time.sleep(1.5 * HEADER_SECONDS)  # longer than for a head: this is the time between requests
        connection.sendall(b"GET /qui")
        assert closed_after(connection) >= 0.9 * HEADER_SECONDS


def test_beyond_the_limit_requests_are_refused_politely(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
    try:
        with connect(port) as connection:
            connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")
        time.sleep(2 * HEADER_SECONDS)
        with connect(port) as connection:
            connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200"), "the idle ones were closed: there is room"
    finally:
        for connection in idle:
            connection.close()


def test_files_may_be_opened_for_every_connection(port: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 30


def test_stopping_sets_the_event() -> None:
    draining = threading.Event()
    server = server_for(FastAPI(), ("127.0.0.1", 0), limits=ServiceLimits(), draining=draining)
    server.handle_exit(15, None)
    assert draining.is_set()
    assert server.should_exit
