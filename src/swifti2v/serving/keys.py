"""API keys: who asks, what they may see, how often they may ask. Kept as hashes in one file."""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from swifti2v.errors import ConfigurationError, InvalidInputError, OutputError
from swifti2v.serving.problems import ApiProblem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastapi import Request

KEY_PREFIX = "sk-swifti2v-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_KEY_CHARACTERS = 512


class ApiKey(BaseModel):
    """One key.

    Args:
        name: of its holder; a key sees the jobs of its name only.
        sha256: of the key. Keys are drawn at random, 256 bits, so that a fast hash without salt is enough.
        max_active_jobs: limit of jobs that wait or run at once.
        requests_per_minute: limit of requests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str
    max_active_jobs: int = 100
    requests_per_minute: int = 600


class _Keys(BaseModel):
    keys: list[ApiKey]


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        name: the owner of what they submit.
        sees: the owner whose jobs they see; None: all.
        max_active_jobs: limit of their own jobs that wait or run at once; None for no limit.
    """

    name: str = ""
    sees: str | None = None
    max_active_jobs: int | None = None


class Access:
    """Tells callers by their keys; everybody may do everything until there is a file of keys.

    Args:
        keys: the file of keys, which need not exist yet: the first key is in force from the moment it is added. None:
            no keys are ever asked for.
    """

    def __init__(self, keys: Path | None) -> None:
        self._keys = None if keys is None else KeyFile(keys)
        self._limiter = RateLimiter()

    def caller(self, request: Request) -> Caller:
        """Return who asks.

        Raises:
            ApiProblem: no key or a wrong one, or too many requests.
            ConfigurationError: the file of keys is damaged.
        """
        if self._keys is None or not self._keys.is_in_force():
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


class KeyFile:
    """The keys of one file, read again whenever it changes.

    Once there has been a file, its keys stay in force: where it goes away, no key is right until it comes back.

    Raises:
        ConfigurationError: the file is damaged; from the methods too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._reload()

    def is_in_force(self) -> bool:
        """Whether keys are asked for."""
        self._reload()
        return self._stamp is not None

    def find(self, key: str) -> ApiKey | None:
        """Return what is known of a key, by its hash: no comparison of secrets that could be timed."""
        self._reload()
        return self._keys.get(_digest(key))

    def _reload(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._keys = {}
            return
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp or not self._keys:
            self._keys = {key.sha256: key for key in read_keys(self._path)}
            self._stamp = stamp


def read_keys(path: Path) -> list[ApiKey]:
    """Return the keys of a file; raise `ConfigurationError` if it is missing or damaged."""
    try:
        return _Keys.model_validate_json(path.read_bytes()).keys
    except (OSError, ValidationError) as error:
        msg = f"the file of keys {path} is missing or damaged; restore it, or remove it and make the keys anew"
        raise ConfigurationError(msg) from error


def add_key(path: Path, name: str, **limits: int) -> str:
    """Make a key for `name`, keep its hash in the file, and return the key: it cannot be had again.

    Raises:
        InvalidInputError: a name that cannot be used, or that has a key.
        OutputError: the file cannot be written.
    """
    if _NAME.fullmatch(name) is None:
        msg = f"{name!r} cannot name a key; use letters, digits, '.', '_' and '-', at most 64"
        raise InvalidInputError(msg)
    known = read_keys(path) if path.exists() else []
    if name in {key.name for key in known}:
        msg = f"{name!r} has a key already; remove it first, or choose another name"
        raise InvalidInputError(msg)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    _write(path, [*known, ApiKey(name=name, sha256=_digest(key), **limits)])
    return key


def remove_key(path: Path, name: str) -> None:
    """Take the key of `name` out of the file; raise `InvalidInputError` if there is none."""
    known = read_keys(path)
    left = [key for key in known if key.name != name]
    if len(left) == len(known):
        msg = f"{name!r} has no key; the names are: {', '.join(key.name for key in known) or 'none'}"
        raise InvalidInputError(msg)
    _write(path, left)


class RateLimiter:
    """Requests a minute by name: a bucket that holds a minute's worth and fills evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, per_minute: int) -> float:
        """Take one request; return 0, or the seconds after which it may be tried again."""
        now = self._clock()
        with self._lock:
            level, filled_at = self._buckets.get(name, (float(per_minute), now))
            level = min(float(per_minute), level + (now - filled_at) * per_minute / 60)
            taken = level >= 1
            self._buckets[name] = level - taken, now
            return 0.0 if taken else (1 - level) * 60 / per_minute


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: Path, keys: list[ApiKey]) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(_Keys(keys=keys).model_dump_json(indent=2))
        partial.replace(path)
    except OSError as error:
        msg = f"the file of keys {path} cannot be written ({error.strerror}); choose another place"
        raise OutputError(msg) from error
