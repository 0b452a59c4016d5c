"""What must not get through, nor bring the service down: bombs, disguises, floods, damaged forms. Never a 500."""

from __future__ import annotations

import asyncio
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

from swifti2v.serving.application import create_app
from swifti2v.serving.settings import ServiceLimits
from tests.serving.conftest import create, picture_bytes, problem, queue_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.testclient import TestClient

    from swifti2v.serving.settings import ServiceSettings

QUICK = hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(response: Any, status: int = 400, param: str | None = None) -> None:
    problem(response, status, param=param)


def post(client: TestClient, content: bytes, kind: str = "application/json") -> Any:
    return client.post("/v1/videos", content=content, headers={"Content-Type": kind})


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (30_000, 30_000), (8_000, 8_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_from_their_header(shared: TestClient, size: tuple[int, int]) -> None:
    problem(create(shared, picture=bomb(*size)), param="input_reference", code="image_too_large")


def test_pictures_that_are_none(shared: TestClient) -> None:
    html = b"<script>alert(1)</script>"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nfile:///etc/passwd\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for content in (b"", b"\0", html, postscript, playlist, svg, picture_bytes()[:60], b"GIF89a" + bytes(20)):
        problem(create(shared, picture=content), param="input_reference", code="invalid_image")


def test_a_picture_that_is_also_something_else_is_kept_as_a_picture(client: TestClient) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("run.sh", "rm -rf /")
    video = create(client, picture=picture_bytes(kind="JPEG") + archive.getvalue()).json()
    kept = queue_of(client).files.input(video["id"])
    assert not zipfile.is_zipfile(kept)
    with PIL.Image.open(kept) as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 8))


def test_names_of_files_mean_nothing(client: TestClient) -> None:
    root, ids = queue_of(client).files.root, []
    for name in ("../../../etc/passwd", "/etc/passwd", "a\\..\\b", "con", "%00.png", "x" * 300, "$(id)"):
        sent = client.post("/v1/videos", data={"prompt": ""}, files={"input_reference": (name, picture_bytes())})
        ids.append(sent.json()["id"])
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if "queue.db" not in path.name)
    assert found == sorted(["jobs", *(f"jobs/{name}{tail}" for name in ids for tail in ("", "/input.png"))])


def test_what_was_done_to_the_picture_is_said(client: TestClient) -> None:
    gray = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(gray, "PNG")
    assert len(create(client, picture=gray.getvalue()).json()["notes"]) == 1


NO_IDS = (
    "..%2f..%2fetc%2fpasswd",
    "video_%00",
    "%ff%fe",
    "video_" + "g" * 32,
    f"video_{'0' * 32}%0a",
    "x" * 3000,
    "'--",
)


def test_ids_that_are_none(shared: TestClient) -> None:
    for path in NO_IDS:
        for tail in ("", "/content", "/events"):
            assert shared.get(f"/v1/videos/{path}{tail}").status_code == 404
        assert shared.delete(f"/v1/videos/{path}").status_code == 404
        assert shared.get(f"/v1/videos?after={path}").status_code in (400, 404)


def test_a_prompt_of_ten_megabytes(shared: TestClient) -> None:
    huge = "x" * 10_000_000
    refused(create(shared, prompt=huge))
    refused(shared.post("/v1/videos", json={"prompt": huge, "input_reference": "data:"}), param="prompt")


def test_a_body_that_is_too_large(serve: Callable[..., TestClient], settings: ServiceSettings) -> None:
    client = serve(replace(settings, limits=ServiceLimits(max_upload_bytes=100_000)))
    assert create(client).status_code == 200
    refused(create(client, picture=bytes(200_000)), 413)
    refused(client.post("/v1/videos", json={"prompt": "x" * 200_000}), 413)


def test_damaged_json(shared: TestClient) -> None:
    for content in (b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000):
        refused(post(shared, content))
    refused(post(shared, b'{"prompt": "\\ud800"}'), param="prompt")
    refused(post(shared, b'{"prompt": "", "input_reference": "", "\\ud800": 1}'))
    refused(post(shared, b'{"prompt": "", "input_reference": "", "query": 1}'), param="query")


def test_damaged_references(shared: TestClient) -> None:
    wrong = ("data:", "data:,", "data:image/png;base64,***", "data:text/html,<b>", 7, [], {}, {"image_url": 1})
    for reference in (*wrong, {"file_id": "f"}):
        sent = shared.post("/v1/videos", json={"prompt": "", "input_reference": reference})
        refused(sent, param="input_reference")


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
    sent = client.post("/v1/videos", json={"prompt": "", "input_reference": url})
    problem(sent, param="input_reference", code="url_not_allowed")


DISPOSITION = b"Content-Disposition: form-data"
DAMAGED_FORMS = (
    ("multipart/form-data", b"--b--"),
    ("multipart/form-data; boundary=", b""),
    ("multipart/form-data; boundary=b", b""),
    ("multipart/form-data; boundary=b", b"--b\r\n"),
    ("multipart/form-data; boundary=b", b"--b\r\n" + DISPOSITION + b"\r\n\r\nx\r\n--b--\r\n"),
    ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
    ("multipart/form-data; boundary=b", b"--b\r\n" + DISPOSITION + b'; name="prompt"\r\n\r\nx'),
    (
        "multipart/form-data; boundary=b; charset=nonsense",
        b"--b\r\n" + DISPOSITION + b'; name="\xff"\r\n\r\nx\r\n--b--\r\n',
    ),
    ("multipart/form-data; boundary=" + "b" * 5000, b"-" * 5000),
    ("application/x-www-form-urlencoded", b"%zz=%ff&&&=&prompt"),
    ("application/x-www-form-urlencoded", b"a=1&" * 5000),
)


def test_damaged_forms(shared: TestClient) -> None:
    for kind, content in DAMAGED_FORMS:
        assert post(shared, content, kind).status_code == 400


def test_a_form_given_twice_or_with_more_files(shared: TestClient) -> None:
    twice = [("input_reference", picture_bytes()), ("input_reference", picture_bytes())]
    refused(shared.post("/v1/videos", data={"prompt": ""}, files=twice))
    prompts = shared.post("/v1/videos", data={"prompt": ["a", "b"]}, files={"input_reference": picture_bytes()})
    refused(prompts, param="prompt")
    refused(shared.post("/v1/videos", files={"prompt": b"text"}), param="prompt")
    refused(shared.post("/v1/videos", data={"prompt": "pan"}, files={"x": b""}), param="x")


def test_other_content_types_methods_and_places(shared: TestClient) -> None:
    for kind in ("", "text/plain", "application/xml", "image/png", ";;;"):
        refused(post(shared, b"x", kind), 415)
    for method in ("PUT", "PATCH", "POST"):
        assert shared.request(method, "/v1/videos/video_1").status_code == 405
        assert shared.request(method, "/v1/../../etc/passwd").json()["error"]["type"] == "invalid_request_error"


def test_request_ids_cannot_forge_headers_or_logs(shared: TestClient) -> None:
    assert shared.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for wrong in ("a b", "x" * 65, '{"level":"x"}', "\u00e9"):
        answer = shared.get("/healthz", headers={"x-request-id": wrong.encode("latin-1")})
        assert answer.headers["x-request-id"].startswith("req_")


@given(content=st.binary(max_size=400), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b"]))
@QUICK
def test_any_body_is_answered(shared: TestClient, content: bytes, kind: str) -> None:
    assert 400 <= post(shared, content, kind).status_code < 500


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), st.lists, max_leaves=5
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["prompt", "size", "seconds", "fps", "seed", "input_reference", "model"]), JSON_VALUES
    )
)
@QUICK
def test_any_values_are_answered(shared: TestClient, fields: dict[str, Any]) -> None:
    assert 400 <= post(shared, json.dumps(fields).encode()).status_code < 500


def test_a_slow_upload_is_given_up(settings: ServiceSettings) -> None:
    """The body trickles in, byte by byte, for longer than it may."""
    application = create_app(replace(settings, limits=ServiceLimits(upload_seconds=0.2)))
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
