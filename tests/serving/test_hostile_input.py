"""What must not get through, nor bring the service down: bombs, disguises, floods, damaged forms. Never a 500."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zipfile
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.serving.application import create_app
from swifti2v.serving.keys import add_key, read_keys
from swifti2v.serving.settings import ServiceLimits
from tests.serving.conftest import create, picture_bytes, queue_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starlette.testclient import TestClient

    from swifti2v.serving.settings import ServiceSettings


def send(client: TestClient, content: bytes, name: str = "a.png") -> Any:
    return client.post("/v1/videos", data={"prompt": "pan"}, files={"input_reference": (name, content)})


def refused(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert "swifti2v-upload" not in message, "no path of this machine"
    return str(message)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (30_000, 30_000), (8_000, 8_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_from_their_header(client: TestClient, size: tuple[int, int]) -> None:
    assert "scale it down" in refused(send(client, bomb(*size)))
    assert list(queue_of(client).files.ids()) == []


def test_pictures_that_are_none(client: TestClient) -> None:
    html = b"<script>alert(1)</script>"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nfile:///etc/passwd\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for content in (b"", b"\0", html, postscript, playlist, svg, picture_bytes()[:60], b"GIF89a" + bytes(20)):
        message = refused(send(client, content))
        assert message.startswith(("image input_reference ", "a picture is needed")), message


def test_a_picture_that_is_also_something_else_is_kept_as_a_picture(client: TestClient) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("run.sh", "rm -rf /")
    video = send(client, picture_bytes(kind="JPEG") + archive.getvalue()).json()
    kept = queue_of(client).files.input(video["id"])
    assert not zipfile.is_zipfile(kept)
    with PIL.Image.open(kept) as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 8))


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a\\..\\b", "con", "%00.png", "x" * 300, "$(id)"]
)
def test_names_of_files_mean_nothing(client: TestClient, name: str) -> None:
    root = queue_of(client).files.root
    video = send(client, picture_bytes(), name).json()
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if "queue.db" not in path.name)
    assert found == ["jobs", f"jobs/{video['id']}", f"jobs/{video['id']}/input.png"]


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2fetc%2fpasswd",
        "video_%00",
        "%ff%fe",
        "video_" + "g" * 32,
        "video_" + "0" * 32 + "%0a",
        "x" * 3000,
        "'--",
    ],
)
def test_ids_that_are_none(client: TestClient, path: str) -> None:
    for tail in ("", "/content", "/events"):
        assert client.get(f"/v1/videos/{path}{tail}").status_code == 404
    assert client.delete(f"/v1/videos/{path}").status_code == 404
    assert client.get(f"/v1/videos?after={path}").status_code in (400, 404)


def test_a_prompt_of_ten_megabytes(client: TestClient) -> None:
    huge = "x" * 10_000_000
    data_url = "data:image/png;base64," + base64.b64encode(picture_bytes()).decode()
    refused(create(client, prompt=huge))
    assert "shorten it" in refused(client.post("/v1/videos", json={"prompt": huge, "input_reference": data_url}))


def test_a_body_that_is_too_large(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    client = serve(replace(settings, limits=ServiceLimits(max_upload_bytes=100_000)))
    assert create(client).status_code == 200
    assert "larger than" in refused(send(client, bytes(200_000)), 413)
    assert "larger than" in refused(client.post("/v1/videos", json={"prompt": "x" * 200_000}), 413)


JSON_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": "\\ud800"}',
]


@pytest.mark.parametrize("content", JSON_BODIES)
def test_damaged_json(client: TestClient, content: bytes) -> None:
    refused(client.post("/v1/videos", content=content, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize(
    "reference",
    [
        "data:",
        "data:,",
        "data:image/png;base64,***",
        "data:text/html,<b>",
        7,
        [],
        {},
        {"file_id": "f"},
        {"image_url": 1},
    ],
)
def test_damaged_references(client: TestClient, reference: Any) -> None:
    refused(client.post("/v1/videos", json={"prompt": "", "input_reference": reference}))


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://127.0.0.1:1/",
        "file:///etc/passwd",
        "https://user@pictures.example/a.png",
        "https://pictures.example.evil.example/a.png",
        "http://pictures.example/a.png",
        "https://[::1",
        "gopher://pictures.example",
    ],
)
def test_nothing_is_fetched_from_hosts_that_are_not_on_the_list(
    serve: Callable[..., TestClient], settings: ServiceSettings, url: str
) -> None:
    client = serve(replace(settings, limits=ServiceLimits(image_hosts=("pictures.example",))))
    message = refused(client.post("/v1/videos", json={"prompt": "", "input_reference": url}))
    assert "are not fetched from there" in message


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=", b""),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'),
        (
            "multipart/form-data; boundary=b; charset=nonsense",
            b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
        ),
        ("multipart/form-data; boundary=" + "b" * 5000, b"-" * 5000),
        ("application/x-www-form-urlencoded", b"%zz=%ff&&&=&prompt"),
        ("application/x-www-form-urlencoded", b"a=1&" * 5000),
    ],
)
def test_damaged_forms(client: TestClient, kind: str, content: bytes) -> None:
    refused(client.post("/v1/videos", content=content, headers={"Content-Type": kind}))


def test_a_form_given_twice_or_with_more_files(client: TestClient) -> None:
    twice = [("input_reference", picture_bytes()), ("input_reference", picture_bytes())]
    refused(client.post("/v1/videos", data={"prompt": ""}, files=twice))
    refused(client.post("/v1/videos", data={"prompt": ["a", "b"]}, files={"input_reference": picture_bytes()}))
    refused(client.post("/v1/videos", files={"prompt": b"text"}))


@pytest.mark.parametrize("kind", ["", "text/plain", "application/xml", "image/png", ";;;"])
def test_other_content_types(client: TestClient, kind: str) -> None:
    refused(client.post("/v1/videos", content=b"x", headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "POST"])
def test_other_methods_and_places(client: TestClient, method: str) -> None:
    assert client.request(method, "/v1/videos/video_1").status_code == 405
    assert client.request(method, "/v1/../../etc/passwd").json()["error"]["type"] == "invalid_request_error"


def test_request_ids_cannot_forge_headers_or_logs(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for wrong in ("a b", "x" * 65, '{"level":"x"}', "\u00e9"):
        answer = client.get("/healthz", headers={"x-request-id": wrong.encode("latin-1")})
        assert answer.headers["x-request-id"].startswith("req_")


@given(content=st.binary(max_size=400), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b"]))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_answered(client: TestClient, content: bytes, kind: str) -> None:
    assert 400 <= client.post("/v1/videos", content=content, headers={"Content-Type": kind}).status_code < 500


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), st.lists, max_leaves=5
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["prompt", "size", "seconds", "fps", "seed", "input_reference", "model"]), JSON_VALUES
    )
)
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_answered(client: TestClient, fields: dict[str, Any]) -> None:
    response = client.post("/v1/videos", content=json.dumps(fields), headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500


def test_a_slow_upload_is_given_up(settings: ServiceSettings) -> None:
    """The body trickles in, byte by byte, for longer than it may."""
    limited = replace(settings, limits=ServiceLimits(upload_seconds=0.2))
    application = create_app(limited)
    sent: list[Any] = []
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send_message(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/videos",
        "raw_path": b"/v1/videos",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("service", 80),
        "client": ("client", 1),
        "root_path": "",
    }
    asyncio.run(application(scope, receive, send_message))
    application.state.service.queue.store.database.close()
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert asked < 15


def test_names_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for name in ("", "../x", "a b", "\n", "x" * 65, "-a"):
        with pytest.raises(InvalidInputError, match="cannot name a key"):
            add_key(path, name)
    add_key(path, "ann")
    with pytest.raises(InvalidInputError, match="has a key already"):
        add_key(path, "ann")
    path.write_text('{"keys": 3')
    with pytest.raises(ConfigurationError, match="damaged"):
        read_keys(path)
