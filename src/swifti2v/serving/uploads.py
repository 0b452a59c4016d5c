"""The body of a request to create a video, multipart or JSON, and its picture.

Sizes are bounded before anything is held: the body by the middleware, the picture by its header (`decoding.py`).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from swifti2v.serving.problems import MAX_ECHO_CHARACTERS, ApiProblem
from swifti2v.serving.schemas import PICTURE_FIELD, PictureLink, data_url_bytes

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.datastructures import FormData

    from swifti2v.serving.settings import ServiceLimits

_MAX_TEXT_BYTES = 1 << 20  # of one text field of a form: ten times the longest prompt
_MAX_FIELDS = 64
_URL_FIELDS = (f"{PICTURE_FIELD}[image_url]", "image_url")  # as OpenAI's clients write the object in a form
_FETCH_SECONDS = 10.0
_PIECE_BYTES = 1 << 16
_HTTPS_PORT = 443


async def read_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a body as they came: text and the bytes of a file in a form, JSON values in JSON.

    Raises:
        ApiProblem: another content type, or a body that is not what it says.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields = await _read_form(request)
    elif kind == "application/json":
        fields = _parse_json(await request.body())
    else:
        raise ApiProblem(415, "send multipart/form-data, or application/json with the picture as a data URL")
    for name in _URL_FIELDS:
        if (url := fields.pop(name, None)) is not None:
            fields.setdefault(PICTURE_FIELD, url)
    return fields


def picture_bytes(reference: bytes | str | PictureLink, limits: ServiceLimits) -> bytes:
    """Return the picture of a request, which is fetched where it is given by its address.

    Raises:
        ApiProblem: it is empty, cannot be fetched, or may not be fetched from there.
        InvalidInputError: a data URL that is none.
    """
    if isinstance(reference, PictureLink):
        reference = reference.image_url
    if isinstance(reference, str):
        is_data = reference.startswith("data:")
        reference = data_url_bytes(reference) if is_data else _fetch(reference, limits)
    if not reference:
        raise ApiProblem(400, "the picture is empty", param=PICTURE_FIELD, code="invalid_image")
    return reference


async def _read_form(request: Request) -> dict[str, Any]:
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_TEXT_BYTES)
    except HTTPException as error:
        raise ApiProblem(400, f"the form cannot be read: {error.detail}", code="invalid_form") from error
    except (ValueError, KeyError, AssertionError, UnicodeError) as error:
        raise ApiProblem(400, "the form cannot be read: it is damaged", code="invalid_form") from error
    try:
        return await _form_fields(form)
    finally:
        await form.close()


async def _form_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        param = name[:MAX_ECHO_CHARACTERS]
        if name in fields:
            raise ApiProblem(400, f"{param!r} is given twice; give it once", param=param)
        if not isinstance(value, str) and name != PICTURE_FIELD:
            raise ApiProblem(400, f"a file cannot be sent as {param!r}; send {PICTURE_FIELD}", param=param)
        fields[name] = value if isinstance(value, str) else await value.read()
    return fields


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ApiProblem(400, "the body is not a JSON object", code="invalid_json")
    return fields


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An allowed host must not send us to another."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        """Follow nothing."""


def _fetch(url: str, limits: ServiceLimits) -> bytes:
    """Fetch a picture over https from a host on the list; the list is empty unless the operator fills it."""
    if not _is_allowed(url, limits):
        message = "pictures are not fetched from there; send the file, or a data URL"
        raise ApiProblem(400, message, param=PICTURE_FIELD, code="url_not_allowed")
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
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ApiProblem(400, "the picture cannot be fetched", param=PICTURE_FIELD, code="fetch_failed") from error
    if len(content) > limits.max_upload_bytes:
        raise ApiProblem(413, "the picture is too large", param=PICTURE_FIELD)
    return bytes(content)


def _is_allowed(url: str, limits: ServiceLimits) -> bool:
    try:
        parts = urlsplit(url)
        place = parts.hostname if parts.port in (None, _HTTPS_PORT) else f"{parts.hostname}:{parts.port}"
    except ValueError:
        return False
    return parts.scheme == "https" and place in limits.image_hosts and parts.username is None
