"""A script for `test_videos.py`, started by torchrun: what a process plans to train on, and what it read for that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from swifti2v.data import validation
from swifti2v.data.clips import ClipOptions
from swifti2v.training.engine.distributed import joined_processes
from swifti2v.training.videos import VideoSelection

SELECTION = VideoSelection(96, 64, max_aspect=1.0, clips=ClipOptions(num_frames=9))


class Reader(validation.VideoReader):
    """Keeps the names of the files that it is opened for."""

    opened: list[str] = []  # noqa: RUF012 - meant to be shared by all readers

    def __init__(self, path: Path, **options: Any) -> None:
        self.opened.append(path.name)
        super().__init__(path, **options)


def main(videos: Path, output: Path, results: Path) -> None:
    validation.VideoReader = Reader  # type: ignore[misc]
    with joined_processes() as processes:
        for run in ("first", "second"):
            Reader.opened.clear()
            requests = SELECTION.requests(videos, size_multiple=16, report=output, processes=processes)
            found = {"clips": [request.name for request in requests], "opened": Reader.opened}
            (results / f"{run}{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
