"""Videos beside a report that is too small to hold them: copied into its folder, so that the folder can be moved."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from swifti2v.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "media"


def place_media(paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """Return the address of each file relative to `folder`, in which it is or to which it is copied.

    Files that stand in `folder` stay where they are; others are copied to ``folder/media`` under their names, with a
    number where names are the same. A copy appears under its name when it is whole.

    Raises:
        OutputError: a copy cannot be written.
    """
    target = folder.resolve()
    there = {path: path.resolve() for path in paths if path.resolve().is_relative_to(target)}
    addresses = {path: found.relative_to(target).as_posix() for path, found in there.items()}
    taken = {found.name.casefold() for found in there.values()}
    for path in dict.fromkeys(paths):
        if path not in addresses:
            name = _free_name(path, taken)
            taken.add(name.casefold())
            _copy(path, target / FOLDER / name)
            addresses[path] = f"{FOLDER}/{name}"
    return {path: quote(address) for path, address in addresses.items()}


def _free_name(path: Path, taken: set[str]) -> str:
    number, name = 1, path.name
    while name.casefold() in taken:  # some file systems do not tell upper from lower case
        number += 1
        name = f"{path.stem}_{number}{path.suffix}"
    return name


def _copy(path: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, part)
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        msg = (
            f"{str(path)!r} cannot be copied to {str(target.parent)!r} ({error.strerror}); "
            "make room or choose another folder for the report"
        )
        raise OutputError(msg) from error
