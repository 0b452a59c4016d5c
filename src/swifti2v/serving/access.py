"""Who asks: the key of a request, what it may see, how often it may ask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.serving.keys import KeyFile, RateLimiter
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import Request

_MAX_KEY_CHARACTERS = 512


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        name: the owner of what they submit.
        sees: the owner whose jobs they see; None: all.
        max_active_jobs: that wait or run at once; None for no limit of their own.
    """

    name: str = ""
    sees: str | None = None
    max_active_jobs: int | None = None


class Access:
    """Tells callers by their keys.

    Args:
        keys: the file of keys; None: everybody may do everything.
    """

    def __init__(self, keys: Path | None) -> None:
        self._keys = None if keys is None else KeyFile(keys)
        self._limiter = RateLimiter()

    def caller(self, request: Request) -> Caller:
        """Return who asks.

        Raises:
            ApiProblem: no key or a wrong one, or too many requests.
        """
        if self._keys is None:
            return Caller()
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        key = None
        if scheme.lower() == "bearer" and 0 < len(secret) <= _MAX_KEY_CHARACTERS:
            key = self._keys.find(secret.strip())
        if key is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiProblem(401, "the API key is missing or wrong; send it as a bearer token", headers=headers)
        request.scope["key_name"] = key.name
        wait_seconds = self._limiter.take(key.name, key.requests_per_minute)
        if wait_seconds:
            headers = {"Retry-After": str(math.ceil(wait_seconds))}
            raise ApiProblem(429, f"more than {key.requests_per_minute} requests a minute; slow down", headers=headers)
        return Caller(key.name, key.name, key.max_active_jobs)
