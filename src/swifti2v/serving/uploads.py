"""The body of a request to create a video: multipart or JSON, its fields, its picture.

Sizes are bounded before anything is held: the body by the middleware, the picture by its header.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import json
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.exceptions import HTTPException

from swifti2v.errors import ImageInputError
from swifti2v.media.images import LoadedImage, load_image
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.datastructures import UploadFile

    from swifti2v.serving.settings import ServiceLimits

IMAGE_FIELD = "input_reference"

_MAX_TEXT_BYTES = 1 << 20  # of one text field of a form: ten times the longest prompt
_MAX_FIELDS = 64
_URL_FIELDS = (f"{IMAGE_FIELD}[image_url]", "image_url")
_FETCH_SECONDS = 10.0


@dataclass(frozen=True)
class CreateBody:
    """What a request carries: its fields as they came (text in a form, JSON values in JSON), and the picture.

    Args:
        fields: all but the picture.
        picture: the bytes of an upload or a data URL.
        picture_url: where the picture is to be fetched, instead.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    picture: bytes | None = None
    picture_url: str | None = None


async def read_body(request: Request) -> CreateBody:
    """Read a request.

    Raises:
        ApiProblem: another content type, or a body that is not what it says.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request)
    if kind == "application/json":
        return _with_picture(_parse_json(await request.body()))
    raise ApiProblem(415, "send multipart/form-data, or application/json with the picture as a data URL")


def decode_picture(body: CreateBody, limits: ServiceLimits) -> LoadedImage:
    """Return the picture of a request, by the image loader of the command line.

    Raises:
        ApiProblem: there is none, it cannot be read, is too large, or would have to be fetched from elsewhere.
    """
    content = body.picture
    if content is None and body.picture_url is not None:
        content = _fetch(body.picture_url, limits)
    if not content:
        raise ApiProblem(400, "a picture is needed to start from; send it as input_reference", param=IMAGE_FIELD)
    _check_pixels(content, limits)
    with tempfile.NamedTemporaryFile(prefix="swifti2v-upload-") as file:
        file.write(content)
        file.flush()
        try:
            return load_image(file.name)
        except ImageInputError as error:
            message = str(error).replace(repr(str(Path(file.name))), IMAGE_FIELD)
            raise ApiProblem(400, message, param=IMAGE_FIELD, code="invalid_image") from error


async def _read_form(request: Request) -> CreateBody:
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_TEXT_BYTES)
    except HTTPException as error:
        raise ApiProblem(400, f"the form cannot be read: {error.detail}", code="invalid_form") from error
    except (ValueError, KeyError, AssertionError, UnicodeError) as error:
        raise ApiProblem(400, "the form cannot be read: it is damaged", code="invalid_form") from error
    try:
        return await _form_fields(form.multi_items())
    finally:
        await form.close()


async def _form_fields(items: list[tuple[str, UploadFile | str]]) -> CreateBody:
    fields: dict[str, Any] = {}
    picture = None
    for name, value in items:
        if name in fields or (name == IMAGE_FIELD and picture is not None):
            raise ApiProblem(400, f"{name[:60]!r} is given twice; give it once", param=name[:60])
        if isinstance(value, str):
            fields[name] = value
        elif name == IMAGE_FIELD:
            picture = await value.read()
        else:
            raise ApiProblem(400, f"a file cannot be sent as {name[:60]!r}; send {IMAGE_FIELD}", param=name[:60])
    if picture is None:
        return _with_picture(fields)
    return CreateBody(fields, picture)


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiProblem(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiProblem(400, "the body is not a JSON object", code="invalid_json")
    return fields


def _with_picture(fields: dict[str, Any]) -> CreateBody:
    """Take the picture out of the fields: a data URL, an address, or OpenAI's object that holds one of them."""
    left = dict(fields)
    url = left.pop(IMAGE_FIELD, None)
    for name in _URL_FIELDS:
        url = left.pop(name, None) or url
    if isinstance(url, dict):
        if set(url) != {"image_url"}:
            raise ApiProblem(400, "input_reference takes a file, or image_url with a data URL", param=IMAGE_FIELD)
        url = url["image_url"]
    if url is None:
        return CreateBody(left)
    if not isinstance(url, str):
        raise ApiProblem(400, "image_url is not text; give a data URL", param=IMAGE_FIELD)
    if url.startswith("data:"):
        return CreateBody(left, _data_url(url))
    return CreateBody(left, picture_url=url)


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiProblem(400, "the data URL is not of the form data:image/png;base64,...", param=IMAGE_FIELD)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiProblem(400, "the data URL is not base64", param=IMAGE_FIELD) from error


def _check_pixels(content: bytes, limits: ServiceLimits) -> None:
    """Refuse a large picture from its header; what has no readable header is left to the loader's messages."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")) as image:
            pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = limits.max_image_pixels + 1
    except Exception:  # noqa: BLE001 - many plugins without one exception of their own; the loader will say it
        return
    if pixels > limits.max_image_pixels:
        message = f"the picture is larger than {limits.max_image_pixels / 1e6:.0f} megapixels; scale it down"
        raise ApiProblem(400, message, param=IMAGE_FIELD, code="image_too_large")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An allowed host must not send us to another."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        """Follow nothing."""


def _fetch(url: str, limits: ServiceLimits) -> bytes:
    """Fetch a picture over https from a host on the list; the list is empty unless the operator fills it."""
    try:
        parts = urlsplit(url)
        allowed = parts.scheme == "https" and parts.hostname in limits.image_hosts and parts.username is None
    except ValueError:
        allowed = False
    if not allowed:
        message = "pictures are not fetched from there; send the file, or a data URL"
        raise ApiProblem(400, message, param=IMAGE_FIELD, code="url_not_allowed")
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            content: bytes = response.read(limits.max_upload_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException, urllib.error.URLError) as error:
        raise ApiProblem(400, "the picture cannot be fetched", param=IMAGE_FIELD, code="fetch_failed") from error
    if len(content) > limits.max_upload_bytes:
        raise ApiProblem(413, "the picture is too large", param=IMAGE_FIELD)
    return content
