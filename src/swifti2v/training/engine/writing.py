"""What a disk refuses, as the error that the command line reports in one line."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from swifti2v.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise `OutputError` that names `place` where a file cannot be written within this context.

    Args:
        place: file or folder that is written.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = str(error).splitlines()[0]
        msg = f"cannot write {place} ({reason}); make room and start again: the run goes on from its last checkpoint"
        raise OutputError(msg) from error
