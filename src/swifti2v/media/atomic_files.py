"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from swifti2v.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO


UNFINISHED = ".*.part"
"""Pattern of what a killed writer leaves behind in a folder."""


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object], *, writer: str = "") -> None:
    """Write `content` beside `path`, flush it to the disk, and give it its name in one step; the name outlives a crash.

    Args:
        path: the file; one of that name is replaced.
        content: all of it, or what writes it into an open file.
        writer: tells processes apart that may write the same file at the same time.

    Raises:
        OutputError: no space, no permission, no such folder; nothing is left behind and an older file stays as it was.
    """
    partial = path.with_name(f".{path.name}{writer}.part")
    try:
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_names(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space and run again" if full else "choose a folder that is writable"
        msg = f"{str(path)!r} cannot be written ({error.strerror}); {fix}"
        raise OutputError(msg) from error


def _flush_names(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raise `OutputError` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"the folder {str(folder)!r} cannot be made ({error.strerror}); choose one that is writable"
        raise OutputError(msg) from error
