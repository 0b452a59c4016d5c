"""An index of clips and photographs: a CSV with at least the columns `file`, `kind` and `caption`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swifti2v.errors import ConfigurationError

REQUIRED_COLUMNS = {"file", "kind", "caption"}


@dataclass(frozen=True)
class MediaItem:
    """One file of an index; `tier` is the index's own grade of its licence ("" if it has none)."""

    path: Path
    kind: Literal["clip", "photo"]
    caption: str
    width: int
    tier: str
    licence: str


def read_index(index: Path) -> list[MediaItem]:
    """Read an index; paths are relative to its folder. Raise `ConfigurationError` for missing columns or files."""
    if not index.is_file():
        msg = f"there is no index at {index}; pass a CSV with the columns {sorted(REQUIRED_COLUMNS)}"
        raise ConfigurationError(msg)
    with index.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = REQUIRED_COLUMNS - set(rows[0] if rows else ())
    if missing:
        msg = f"{index} lacks the columns {sorted(missing)}; add them to its first line"
        raise ConfigurationError(msg)
    items = [_item(index.parent, row) for row in rows]
    absent = [item.path.name for item in items if not item.path.is_file()]
    if absent:
        msg = f"{index} names {len(absent)} missing files, the first is {absent[0]}; remove the lines or add the files"
        raise ConfigurationError(msg)
    return items


def _item(folder: Path, row: dict[str, str]) -> MediaItem:
    if row["kind"] not in {"clip", "photo"}:
        msg = f"{row['file']} is of kind {row['kind']!r}; use clip or photo"
        raise ConfigurationError(msg)
    return MediaItem(
        path=folder / row["file"],
        kind="clip" if row["kind"] == "clip" else "photo",
        caption=row["caption"],
        width=int(row.get("width") or 0),
        tier=row.get("licence_tier") or "",
        licence=row.get("licence") or "",
    )
