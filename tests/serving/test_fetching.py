"""Pictures by URL: only from hosts on the list, over TLS that is checked, without redirects, within limits."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest

from swifti2v.serving.settings import ServiceLimits
from tests.serving.conftest import picture_bytes, problem, queue_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.testclient import TestClient

    from swifti2v.serving.settings import ServiceSettings

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl is needed to make a certificate")

LARGE = 200_000


class Pictures(http.server.BaseHTTPRequestHandler):
    """A picture, a redirect to it, and something large."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        content = bytes(LARGE) if self.path == "/large" else picture_bytes((24, 16))
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for `localhost` that nobody trusts yet, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run([str(OPENSSL), *arguments.split(), *names], check=True, capture_output=True)  # noqa: S603 - a test
    return paths


@pytest.fixture
def pictures(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server of pictures, whose certificate is trusted, and no proxy between."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("no_proxy", "localhost")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(client: TestClient, url: str) -> Any:
    return client.post("/v1/videos", json={"prompt": "pan", "input_reference": {"image_url": url}})


@pytest.fixture
def place(pictures: Any) -> str:
    return f"localhost:{pictures.server_port}"


def test_a_picture_is_fetched_from_a_host_on_the_list(
    serve: Callable[..., TestClient], settings: ServiceSettings, pictures: Any, place: str
) -> None:
    client = serve(replace(settings, limits=ServiceLimits(image_hosts=(place,))))
    response = ask(client, f"https://{place}/a.png")
    assert response.status_code == 200, response.text
    with PIL.Image.open(queue_of(client).files.input(response.json()["id"])) as kept:
        assert kept.size == (24, 16)
    assert pictures.asked == ["/a.png"]


def test_what_is_fetched_has_limits(
    serve: Callable[..., TestClient], settings: ServiceSettings, pictures: Any, place: str
) -> None:
    client = serve(replace(settings, limits=ServiceLimits(image_hosts=(place,), max_upload_bytes=LARGE // 2)))
    limits = (("/redirect", 400, "fetch_failed"), ("/missing", 400, "fetch_failed"), ("/large", 413, None))
    for path, status, code in limits:
        problem(ask(client, f"https://{place}{path}"), status, param="input_reference", code=code)
    assert pictures.asked == [path for path, _, _ in limits], "no redirect was followed"


def test_other_ports_and_certificates_are_not_trusted(
    serve: Callable[..., TestClient],
    settings: ServiceSettings,
    pictures: Any,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = serve(replace(settings, limits=ServiceLimits(image_hosts=("localhost",))))
    problem(ask(client, f"https://{place}/a.png"), param="input_reference", code="url_not_allowed")
    monkeypatch.delenv("SSL_CERT_FILE")
    client = serve(replace(settings, data=settings.data / "other", limits=ServiceLimits(image_hosts=(place,))))
    problem(ask(client, f"https://{place}/a.png"), param="input_reference", code="fetch_failed")
    assert pictures.asked == []
