"""What became of every video of a data set: the pieces that can be used, and each that cannot with its reason."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.errors import OutputError
from swifti2v.media.atomic_files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.geometry import Size

Reason = Literal[
    "malformed entry", "repeated entry", "outside the folder", "missing file", "unknown format", "empty caption",
    "copy of another", "unreadable", "damaged", "too small", "low frame rate", "too short", "static", "scene cut",
    "smaller than its bucket", "not finite",
]  # fmt: skip
"""Why something is skipped; `docs/guides/data.md` says what to do about each."""

REPORT_SUFFIXES = (".json", ".csv")


@dataclass(frozen=True)
class Skipped:
    """A video, or a piece of one, that is not used.

    Args:
        name: the path in the data set; of a piece followed by its frames, ``clip.mp4[120:200]``.
        reason: one of a short list, to be counted.
        detail: what was found.
    """

    name: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Scene:
    """A piece of a video without a cut in it, usable as it is.

    Args:
        name: path of the video in the data set.
        path: where it lies.
        prompt: its caption.
        size: as displayed, in pixels.
        first_frame: of the piece, counted at the rate of the report.
        num_frames: at the rate of the report.
        motion: how far the picture gets from the first of the piece, in levels of 255 (`scenes.SceneFinder`).
    """

    name: str
    path: Path
    prompt: str
    size: Size
    first_frame: int
    num_frames: int
    motion: float


@dataclass(frozen=True)
class Report:
    """The outcome for a whole data set.

    Args:
        fps: rate at which frames are counted.
        scenes: what can be used, in the order of the manifest.
        skipped: what cannot.
    """

    fps: float
    scenes: tuple[Scene, ...]
    skipped: tuple[Skipped, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of pieces skipped for each reason, the most frequent first."""
        return dict(Counter(item.reason for item in self.skipped).most_common())

    @property
    def num_videos(self) -> int:
        """Number of videos of which at least a piece can be used."""
        return len({scene.name for scene in self.scenes})

    @property
    def num_seconds(self) -> float:
        """Length of all that can be used."""
        return sum(scene.num_frames for scene in self.scenes) / self.fps

    def as_mapping(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "fps": self.fps,
            "num_videos": self.num_videos,
            "num_scenes": len(self.scenes),
            "num_seconds": round(self.num_seconds, 3),
            "num_skipped": len(self.skipped),
            "skipped_by_reason": self.counts,
            "scenes": [_scene_mapping(scene) for scene in self.scenes],
            "skipped": [asdict(item) for item in self.skipped],
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON, or as CSV with a line for each piece, by the extension of `path`.

        Raises:
            OutputError: another extension, or the file cannot be written.
        """
        check_report_path(path)
        text = json.dumps(self.as_mapping(), indent=2) if path.suffix.lower() == ".json" else self._as_csv()
        write_atomically(path, text.encode())

    def _as_csv(self) -> str:
        columns = ["name", "status", "reason", "detail", "width", "height", "first_frame", "num_frames", "motion"]
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for scene in self.scenes:
            writer.writerow({"status": "accepted"} | _scene_mapping(scene))
        for item in self.skipped:
            writer.writerow({"status": "skipped"} | asdict(item))
        return file.getvalue()


def check_report_path(path: Path) -> None:
    """Raise `OutputError` unless a report can be written under this name; to be asked before the long work."""
    if path.suffix.lower() not in REPORT_SUFFIXES:
        msg = f"a report cannot be written as {str(path)!r}; use the extension {' or '.join(REPORT_SUFFIXES)}"
        raise OutputError(msg)
    if not path.parent.is_dir():
        msg = f"{str(path.parent)!r} is no folder; make it before the report is written there"
        raise OutputError(msg)


def _scene_mapping(scene: Scene) -> dict[str, Any]:
    return {
        "name": scene.name,
        "prompt": scene.prompt,
        "width": scene.size.width,
        "height": scene.size.height,
        "first_frame": scene.first_frame,
        "num_frames": scene.num_frames,
        "motion": round(scene.motion, 2),
    }
