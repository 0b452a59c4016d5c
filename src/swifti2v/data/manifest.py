"""Which videos a data set holds and what they show: a manifest file, or a caption file beside each video.

Read are ``metadata.csv``, ``metadata.jsonl`` and ``metadata.json`` with the columns of DiffSynth-Studio
(``video,prompt``), of `datasets`' VideoFolder (``file_name,text`` or ``caption``), of musubi-tuner (``video_path,
caption``) or of our own indices (``file,caption``); without such a file, ``clip.mp4`` with ``clip.txt`` as musubi-tuner
and kohya's scripts have it. Paths are relative to the folder.

A manifest that cannot be understood is an error. A line of it that cannot be used is skipped and counted.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.data.report import Skipped
from swifti2v.errors import ConfigurationError

if TYPE_CHECKING:
    from swifti2v.data.report import Reason

MANIFEST_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")
VIDEO_COLUMNS = ("video", "file_name", "video_path", "file")
CAPTION_COLUMNS = ("prompt", "text", "caption")
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".ogv", ".wmv",
        ".mxf", ".gif",
    }
)  # fmt: skip
"""Extensions of files that are taken for videos; whether they are is found out when they are read."""

# A record of a manifest: where it stands, and its values by column, or why it is none.
_Record = tuple[str, dict[str, Any] | str]


@dataclass(frozen=True)
class ManifestOptions:
    """How a folder is read.

    Args:
        manifest: file to read, relative to the folder or absolute; default: the one of `MANIFEST_NAMES` that is there.
        empty_captions: `skip` counts videos without a caption as skipped; `keep` takes them with the prompt "", for
            training without a condition.
        caption_extension: of the caption file beside each video, where there is no manifest.
    """

    manifest: Path | None = None
    empty_captions: Literal["skip", "keep"] = "skip"
    caption_extension: str = ".txt"


@dataclass(frozen=True)
class ManifestEntry:
    """A video: its path relative to the folder ("/" on every system; unique), where it lies, what it shows."""

    name: str
    path: Path
    prompt: str


@dataclass(frozen=True)
class Manifest:
    """The videos of a folder, in the order in which they are listed.

    Args:
        source: name of the manifest file, or "caption files".
        entries: videos that exist and may be used.
        skipped: lines that cannot be used.
    """

    source: str
    entries: tuple[ManifestEntry, ...]
    skipped: tuple[Skipped, ...]


def read_manifest(folder: Path, options: ManifestOptions | None = None) -> Manifest:
    """Read which videos `folder` holds; no video is opened.

    Raises:
        ConfigurationError: no such folder, no videos in it, two manifests, or a manifest that cannot be read, is
            empty, of an unknown format, or without a column for the video or for the caption.
    """
    options = options or ManifestOptions()
    if not folder.is_dir():
        msg = f"{str(folder)!r} is no folder; give the folder that holds the videos"
        raise ConfigurationError(msg)
    path = _manifest_path(folder, options)
    collector = _Collector(folder, options)
    if path is None:
        source = "caption files"
        for video in _videos_in(folder):
            collector.add_with_caption_file(video)
    else:
        source = path.name
        _collect(path, collector)
    if not collector.entries and not collector.skipped:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
        msg = f"{str(folder)!r} holds no videos; add files ({suffixes}) or a manifest ({', '.join(MANIFEST_NAMES)})"
        raise ConfigurationError(msg)
    return Manifest(source, tuple(collector.entries.values()), tuple(collector.skipped))


def _manifest_path(folder: Path, options: ManifestOptions) -> Path | None:
    if options.manifest is not None:
        path = folder / options.manifest
        if not path.is_file():
            msg = f"there is no manifest {str(path)!r}; give its path relative to the folder of the videos"
            raise ConfigurationError(msg)
        return path
    found = [folder / name for name in MANIFEST_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        msg = f"{str(folder)!r} holds {names}; keep one, or say which to read (--manifest)"
        raise ConfigurationError(msg)
    return found[0] if found else None


def _videos_in(folder: Path) -> list[Path]:
    """Files with the extension of a video, in this folder and below; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _collect(path: Path, collector: _Collector) -> None:
    """Add the records of a manifest; its columns are those of the first record that is one."""
    columns: tuple[str, str] | None = None
    empty = True
    for place, record in _records(path):
        empty = False
        if isinstance(record, str):
            collector.skip(place, "malformed entry", record)
            continue
        if columns is None:
            columns = _column(path, record, VIDEO_COLUMNS), _column(path, record, CAPTION_COLUMNS)
        collector.add(place, record.get(columns[0]), record.get(columns[1]))
    if empty:
        msg = f"the manifest {str(path)!r} is empty; write a line for each video"
        raise ConfigurationError(msg)


def _column(path: Path, record: dict[str, Any], known: tuple[str, ...]) -> str:
    found = [name for name in known if name in record]
    if len(found) == 1:
        return found[0]
    what = "video" if known is VIDEO_COLUMNS else "caption"
    if found:
        msg = f"{path.name} has {len(found)} columns for the {what} ({', '.join(found)}); keep one of them"
        raise ConfigurationError(msg)
    there = ", ".join(repr(name) for name in record) or "none"
    msg = f"{path.name} has no column for the {what}; name it {' or '.join(known)} (there are: {there})"
    raise ConfigurationError(msg)


def _records(path: Path) -> Iterator[_Record]:
    readers = {".csv": _csv_records, ".jsonl": _json_lines, ".json": _json_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        msg = f"the manifest {path.name!r} has an unknown format; write {', '.join(readers)}"
        raise ConfigurationError(msg)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from reader(file, path)
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigurationError(msg) from error
    except (OSError, csv.Error) as error:
        msg = f"{str(path)!r} cannot be read ({error}); check the file"
        raise ConfigurationError(msg) from error


def _csv_records(file: Any, path: Path) -> Iterator[_Record]:
    reader = csv.DictReader(file, skipinitialspace=True)
    if reader.fieldnames is not None:
        header = dict.fromkeys(reader.fieldnames)
        for known in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            _column(path, header, known)  # a file that has a header only says what is wrong with it
    for row in reader:
        place = f"{path.name} line {reader.line_num}"
        if None in row:
            # Half a caption must not pass for the whole: this is what a comma without quotes does.
            yield place, 'has more fields than columns: put quotes (") around a caption with commas'
        else:
            yield place, dict(row)


def _json_lines(file: Any, path: Path) -> Iterator[_Record]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path.name} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            yield place, f"is not JSON ({error})"
            continue
        yield place, record if isinstance(record, dict) else "is not a JSON object"


def _json_records(file: Any, path: Path) -> Iterator[_Record]:
    try:
        content = json.load(file)
    except ValueError as error:
        msg = f"{str(path)!r} is not JSON ({error}); write a list of objects"
        raise ConfigurationError(msg) from error
    if not isinstance(content, list):
        msg = f"{str(path)!r} does not hold a list; write [{{...}}, {{...}}], an object for each video"
        raise ConfigurationError(msg)
    for number, record in enumerate(content, start=1):
        yield f"{path.name} entry {number}", record if isinstance(record, dict) else "is not a JSON object"


class _Collector:
    """Sorts records into videos to use and lines to skip."""

    def __init__(self, folder: Path, options: ManifestOptions) -> None:
        self.folder = folder
        self.options = options
        self.entries: dict[str, ManifestEntry] = {}
        self.skipped: list[Skipped] = []

    def skip(self, name: str, reason: Reason, detail: str) -> None:
        self.skipped.append(Skipped(name, reason, detail))

    def add(self, place: str, video: Any, caption: Any) -> None:
        """Add a record of a manifest."""
        if not isinstance(video, str) or not video.strip():
            self.skip(place, "malformed entry", "names no video")
            return
        if caption is not None and not isinstance(caption, str):
            self.skip(place, "malformed entry", f"its caption is a {type(caption).__name__}, not text")
            return
        name = self._name(video.strip())
        if name is None:
            self.skip(
                video.strip(), "outside the folder", f"{place} leaves {self.folder.name!r}: move the file into it"
            )
        elif self._is_usable(name, place):
            self._add(name, caption or "")

    def add_with_caption_file(self, video: Path) -> None:
        """Add a video that was found in the folder."""
        name = video.relative_to(self.folder).as_posix()
        path = video.with_suffix(self.options.caption_extension)
        try:
            caption = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            self.skip(name, "malformed entry", f"its caption file {path.name} cannot be read ({error})")
            return
        self._add(name, caption)

    def _name(self, video: str) -> str | None:
        """Path relative to the folder, or None if it leaves it; links in it are the owner's and are followed."""
        inside = os.path.normpath(video.replace("\\", "/"))
        if Path(inside).is_absolute():
            inside = os.path.relpath(inside, self.folder.absolute())
        return None if inside in ("..", ".") or inside.startswith("../") else inside

    def _is_usable(self, name: str, place: str) -> bool:
        if name in self.entries:
            self.skip(name, "repeated entry", f"{place} names it again; the first caption counts")
        elif not (self.folder / name).is_file():
            self.skip(name, "missing file", f"{place} names it, but it is not there")
        elif Path(name).suffix.lower() not in VIDEO_SUFFIXES:
            self.skip(name, "unknown format", f"{Path(name).suffix or 'no extension'} is no video format that is read")
        else:
            return True
        return False

    def _add(self, name: str, caption: str) -> None:
        prompt = caption.strip()
        if not prompt and self.options.empty_captions == "skip":
            self.skip(name, "empty caption", "write a caption, or keep such videos (--keep-empty-captions)")
            return
        self.entries[name] = ManifestEntry(name, self.folder / name, prompt)
