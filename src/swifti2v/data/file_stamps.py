"""Whether a file is still the one that was read, without reading all of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SAMPLED_BYTES = 1 << 20


def file_stamp(path: Path) -> str:
    """Return size and time of change; raise `OSError` if there is no such file."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def content_key(path: Path) -> str:
    """Return size and a hash of the first and the last megabyte, equal for copies; raise `OSError` as `open` does."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(max(file.tell(), size_bytes - _SAMPLED_BYTES))
        digest.update(file.read(_SAMPLED_BYTES))
    return f"{size_bytes} {digest.hexdigest()}"
