"""What reading videos has shown, kept on the disk, so that each is decoded once and not at every start.

```
checked/<hash>.json     some videos each; whole or not there, never changed
```
A record holds while its file (size and time of change) and the options are the same. Captions are not in it: they may
change. Several processes write into one folder without locks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swifti2v.data.description import file_stamp
from swifti2v.data.report import Scene, Skipped
from swifti2v.data.validation import CheckedVideo, OnVideo, ValidationOptions, Verdict, check_videos
from swifti2v.errors import LatentCacheError
from swifti2v.geometry import Size
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.data.manifest import ManifestEntry

FORMAT = 1
VIDEOS_OF_A_FILE = 16
"""So many are read again at most, by each process, after a run that was killed."""


def read_checked(folder: Path, entries: Sequence[ManifestEntry], options: ValidationOptions) -> dict[str, CheckedVideo]:
    """Return what is known of the videos, by name; those that changed, or were checked otherwise, are left out.

    Raises:
        LatentCacheError: a file of `folder` is damaged.
    """
    stamped = {entry.name: (entry, _stamp(entry.path)) for entry in entries}
    known: dict[str, CheckedVideo] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["options"] != _conditions(options):
                continue
            for name, record in content["videos"].items():
                entry, stamp = stamped.get(name, (None, ""))
                if entry is not None and record["stamp"] == stamp != "":
                    known[name] = CheckedVideo(name, stamp, record["content"], _verdict(entry, record))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{str(path)!r} is damaged; remove it and start again: only its videos are read once more"
            raise LatentCacheError(msg) from error
    return known


def check_and_keep(
    entries: Sequence[ManifestEntry],
    options: ValidationOptions,
    *,
    folder: Path | None,
    on_video: OnVideo | None = None,
) -> dict[str, CheckedVideo]:
    """Read videos and return what each has shown, by name.

    Args:
        entries: those to read.
        options: what they must be.
        folder: where to keep it, also if this is interrupted; None: nowhere.
        on_video: see `OnVideo`.

    Raises:
        OutputError: it cannot be written.
    """
    checked: dict[str, CheckedVideo] = {}
    waiting: list[CheckedVideo] = []
    try:
        for video in check_videos(entries, options, on_video=on_video):
            checked[video.name] = video
            waiting.append(video)
            if len(waiting) == VIDEOS_OF_A_FILE:
                _write(folder, waiting, options)
                waiting = []
    finally:
        _write(folder, waiting, options)
    return checked


def _write(folder: Path | None, videos: Sequence[CheckedVideo], options: ValidationOptions) -> None:
    if folder is None or not videos:
        return
    make_folder(folder)
    records = {video.name: _record(video) for video in videos}
    content = json.dumps({"options": _conditions(options), "videos": records}).encode()
    write_atomically(folder / f"{hashlib.sha256(content).hexdigest()[:20]}.json", content)


def _conditions(options: ValidationOptions) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(options)}


def _record(video: CheckedVideo) -> dict[str, Any]:
    scenes = video.verdict.scenes
    return {
        "stamp": video.stamp,
        "content": video.content,
        "size": list(scenes[0].size) if scenes else None,
        "scenes": [[scene.first_frame, scene.num_frames, scene.motion] for scene in scenes],
        "skipped": [asdict(item) for item in video.verdict.skipped],
    }


def _verdict(entry: ManifestEntry, record: Mapping[str, Any]) -> Verdict:
    scenes = (Scene(entry.name, entry.path, entry.prompt, Size(*record["size"]), *scene) for scene in record["scenes"])
    return Verdict(tuple(scenes), tuple(Skipped(**item) for item in record["skipped"]))


def _stamp(path: Path) -> str:
    try:
        return file_stamp(path)
    except OSError:
        return ""
