"""The body of a request to create a video: multipart or JSON, its fields, its picture.

Sizes are bounded before anything is held: the body by the middleware, the picture by its header (`decoding.py`).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from swifti2v.errors import ImageInputError
from swifti2v.serving.decoding import PictureTooLargeError
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.datastructures import UploadFile

    from swifti2v.media.images import LoadedImage
    from swifti2v.serving.decoding import PictureDecoder
    from swifti2v.serving.settings import ServiceLimits

IMAGE_FIELD = "input_reference"

_MAX_TEXT_BYTES = 1 << 20  # of one text field of a form: ten times the longest prompt
_MAX_FIELDS = 64
_URL_FIELDS = (f"{IMAGE_FIELD}[image_url]", "image_url")
_FETCH_SECONDS = 10.0
_PIECE_BYTES = 1 << 16
_HTTPS_PORT = 443


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


def fetch_picture(body: CreateBody, limits: ServiceLimits) -> CreateBody:
    """Return the body with its picture, which is fetched where it is given by its address.

    Raises:
        ApiProblem: there is none, or it cannot be fetched, or may not be fetched from there.
    """
    if body.picture is None and body.picture_url is not None:
        body = replace(body, picture=_fetch(body.picture_url, limits))
    if not body.picture:
        raise ApiProblem(400, "a picture is needed to start from; send it as input_reference", param=IMAGE_FIELD)
    return body


def decode_picture(body: CreateBody, decoder: PictureDecoder) -> LoadedImage:
    """Return the picture of a request.

    Raises:
        ApiProblem: it cannot be read, or is too large.
    """
    try:
        return decoder.decode(body.picture or b"")
    except PictureTooLargeError as error:
        raise ApiProblem(400, str(error), param=IMAGE_FIELD, code="image_too_large") from error
    except ImageInputError as error:
        raise ApiProblem(400, str(error), param=IMAGE_FIELD, code="invalid_image") from error


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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An allowed host must not send us to another."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        """Follow nothing."""


def _fetch(url: str, limits: ServiceLimits) -> bytes:
    """Fetch a picture over https from a host on the list; the list is empty unless the operator fills it."""
    if not _is_allowed(url, limits):
        message = "pictures are not fetched from there; send the file, or a data URL"
        raise ApiProblem(400, message, param=IMAGE_FIELD, code="url_not_allowed")
    opener = urllib.request.build_opener(_NoRedirects)
    deadline = time.monotonic() + _FETCH_SECONDS
    content = bytearray()
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            # In pieces, since the time limit of a socket begins anew with each byte.
            while len(content) <= limits.max_upload_bytes and (piece := response.read1(_PIECE_BYTES)):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
    except (OSError, ValueError, http.client.HTTPException, urllib.error.URLError) as error:
        raise ApiProblem(400, "the picture cannot be fetched", param=IMAGE_FIELD, code="fetch_failed") from error
    if len(content) > limits.max_upload_bytes:
        raise ApiProblem(413, "the picture is too large", param=IMAGE_FIELD)
    return bytes(content)


def _is_allowed(url: str, limits: ServiceLimits) -> bool:
    try:
        parts = urlsplit(url)
        place = parts.hostname if parts.port in (None, _HTTPS_PORT) else f"{parts.hostname}:{parts.port}"
    except ValueError:
        return False
    return parts.scheme == "https" and place in limits.image_hosts and parts.username is None
