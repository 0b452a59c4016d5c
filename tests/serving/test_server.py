"""The HTTP server: silent and dripping connections are closed, those at work are not, and there is room for many."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from swifti2v.serving.server import server_for
from swifti2v.serving.settings import ServiceLimits
from tests.jobs.conftest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_SECONDS = 0.5
PATIENCE_SECONDS = 600.0  # with a busy machine


@contextmanager
def served(limits: ServiceLimits) -> Iterator[int]:
    """The port of a server of an application with a quick and a slow answer."""
    app = FastAPI()

    @app.get("/quick")
    def quick() -> str:
        return "done"

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(3 * HEADER_SECONDS)
        return "done"

    draining = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    server = server_for(app, ("127.0.0.1", 0), limits=limits, draining=draining)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def port() -> Iterator[int]:
    """A server that does not wait long for a head."""
    with served(ServiceLimits(header_seconds=HEADER_SECONDS)) as port:
        yield port


def connect(port: int) -> Any:
    return closing(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS))


def received_to_end(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    answer = b""
    while piece := connection.recv(1000):
        answer += piece
    return answer


def status_of_quick(port: int) -> bytes:
    with connect(port) as connection:
        connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return received_to_end(connection).split(b" ")[1]


def received_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what the server sends up to `end`: head and body need not come in one piece."""
    answer = b""
    while not answer.endswith(end):
        piece = connection.recv(1000)
        assert piece, f"the server closed the connection after {answer!r}"
        answer += piece
    return answer


def test_a_silent_connection_is_closed(port: int) -> None:
    started = time.monotonic()
    with connect(port) as connection:
        assert received_to_end(connection) == b""
    assert time.monotonic() - started >= 0.9 * HEADER_SECONDS


def test_a_head_that_drips_is_not_waited_for(port: int) -> None:
    """Each byte comes in good time, the head as a whole does not."""
    started = time.monotonic()
    with connect(port) as connection:
        connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\nX-Long: ")
        with pytest.raises(ConnectionError):  # noqa: PT012 - it breaks off somewhere in between
            while time.monotonic() - started < PATIENCE_SECONDS:
                connection.sendall(b"x")
                time.sleep(HEADER_SECONDS / 10)
        assert time.monotonic() - started >= 0.9 * HEADER_SECONDS


def test_an_answer_that_takes_longer_is_waited_for(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = received_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b'"done"')


def test_a_connection_is_kept_for_the_next_request_but_not_for_half_of_one(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n")
            assert received_until(connection, b'"done"').startswith(b"HTTP/1.1 200 OK")
            time.sleep(1.5 * HEADER_SECONDS)  # longer than for a head: this is the time between requests
        started = time.monotonic()
        connection.sendall(b"GET /qui")
        assert received_to_end(connection) == b""
    assert time.monotonic() - started >= 0.9 * HEADER_SECONDS


def test_beyond_the_limit_requests_are_refused_politely() -> None:
    with served(ServiceLimits(header_seconds=PATIENCE_SECONDS, max_connections=30)) as port, ExitStack() as idle:
        for _ in range(30):
            idle.enter_context(connect(port))
        assert status_of_quick(port) == b"503"
        idle.close()
        wait_for(lambda: status_of_quick(port) == b"200")


def test_silent_connections_do_not_keep_their_place() -> None:
    limits = ServiceLimits(header_seconds=HEADER_SECONDS, max_connections=2)
    with served(limits) as port, connect(port), connect(port):
        wait_for(lambda: status_of_quick(port) == b"200")


def test_files_may_be_opened_for_every_connection(port: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= ServiceLimits().max_connections


def test_stopping_sets_the_event() -> None:
    draining = threading.Event()
    server = server_for(FastAPI(), ("127.0.0.1", 0), limits=ServiceLimits(), draining=draining)
    server.handle_exit(15, None)
    assert draining.is_set()
    assert server.should_exit
