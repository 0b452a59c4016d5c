"""API keys: kept as hashes in one file, each with a name that owns its jobs, and limits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swifti2v.config import from_mapping
from swifti2v.errors import ConfigurationError, InvalidInputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY_PREFIX = "sk-swifti2v-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ApiKey:
    """One key.

    Args:
        name: of its holder; a key sees the jobs of its name only.
        sha256: of the key. Keys are drawn at random, 256 bits, so that a fast hash without salt is enough.
        max_active_jobs: that wait or run at once.
        requests_per_minute: of any kind.
    """

    name: str
    sha256: str
    max_active_jobs: int = 100
    requests_per_minute: int = 600


class KeyFile:
    """The keys of one file, read again whenever it changes.

    Raises:
        ConfigurationError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._reload()

    def find(self, key: str) -> ApiKey | None:
        """Return what is known of a key, by its hash: no comparison of secrets that could be timed."""
        self._reload()
        return self._keys.get(_digest(key))

    def _reload(self) -> None:
        try:
            status = self._path.stat()
        except OSError as error:
            msg = f"the file of keys {self._path} cannot be read; make a key with: swifti2v serve add-key NAME"
            raise ConfigurationError(msg) from error
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._keys = {key.sha256: key for key in read_keys(self._path)}
            self._stamp = stamp


def read_keys(path: Path) -> list[ApiKey]:
    """Return the keys of a file; raise `ConfigurationError` if it is damaged."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = content["keys"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"the file of keys {path} is damaged; restore it, or remove it and make the keys anew"
        raise ConfigurationError(msg) from error
    return [from_mapping(ApiKey, entry, where=str(path)) for entry in entries]


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
    _write(path, [*known, ApiKey(name, _digest(key), **limits)])
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
            if level < 1:
                self._buckets[name] = level, now
                return (1 - level) * 60 / per_minute
            self._buckets[name] = level - 1, now
            return 0.0


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: Path, keys: list[ApiKey]) -> None:
    content = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2)
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
        partial.replace(path)
    except OSError as error:
        msg = f"the file of keys {path} cannot be written ({error.strerror}); choose another place"
        raise OutputError(msg) from error
