"""A Python environment that is not ours: the interpreter that the user named, and what it says when it fails."""

from __future__ import annotations

import shutil

from swifti2v.errors import InvalidInputError


def find_interpreter(python: str, *, owner: str) -> str:
    """Return the path of an interpreter, given as a path or as a name on the search path.

    Raises:
        InvalidInputError: there is no such program; the message names its `owner`.
    """
    path = shutil.which(python)
    if path is None:
        msg = f"{python!r} is no program that can be run; name the Python of {owner}'s environment"
        raise InvalidInputError(msg)
    return path


def last_line(said: str) -> str:
    """Return the last line of what a process printed, where Python names the error; at most 300 characters."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
