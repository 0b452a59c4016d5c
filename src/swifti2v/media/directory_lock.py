"""A work directory belongs to one run at a time."""

from __future__ import annotations

import errno
import fcntl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swifti2v.errors import OutputError, WorkDirectoryError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_NAME = ".lock"

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Hold `directory`, which exists, so that no other run works in it; the system lets go when the process ends.

    The lock is an advisory one (`flock`) on a file that stays. Where the file system has no locks, nothing is held.

    Raises:
        WorkDirectoryError: another run, of this process or another, holds the directory.
        OutputError: the directory cannot be written.
    """
    try:
        file = (directory / LOCK_NAME).open("wb")
    except OSError as error:
        msg = f"the work directory {directory} cannot be written ({error.strerror}); choose another one"
        raise OutputError(msg) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another run works in {directory}; wait until it ends, or give another --work-dir"
            raise WorkDirectoryError(msg) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        yield
