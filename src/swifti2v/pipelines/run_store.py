"""What a run leaves on disk so that it can be resumed: the motion reference and every finished segment.

```
work-dir/
  run.json                  image, prompt, checkpoint and settings that the contents belong to
  motion_reference/         uint8 frames, a piece a window (`media/frame_store.py`)
  segments/segment_0000.safetensors   targets of a segment, float32
```
Every file is written beside its name and renamed, so that a run that is killed leaves whole files only.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError

from swifti2v.errors import OutputError, WorkDirectoryError
from swifti2v.media.frame_store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from swifti2v.segments import Segment

RECORD_NAME = "run.json"


class RunStore:
    """The files of one run in `directory`, which is made if it does not exist.

    Raises:
        OutputError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            (directory / "segments").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the work directory {directory} cannot be made ({error.strerror}); choose one that is writable"
            raise OutputError(msg) from error
        self.motion = FrameStore(directory / "motion_reference")

    @classmethod
    @contextmanager
    def open(cls, directory: Path | None) -> Iterator[RunStore]:
        """Open `directory`, or a temporary one that is removed at the end."""
        if directory is not None:
            yield cls(directory)
            return
        with TemporaryDirectory(prefix="swifti2v-") as temporary:
            yield cls(Path(temporary))

    def claim(self, part: str, identity: Mapping[str, Any]) -> None:
        """Record that `part` of the run is decided by `identity`, or check that it is what was recorded.

        Raises:
            WorkDirectoryError: the directory holds this part of another run; the message names what differs.
        """
        record = self._record()
        wanted = {name: str(value) for name, value in identity.items()}
        if part in record:
            different = sorted(
                name for name in wanted.keys() | record[part].keys() if wanted.get(name) != record[part].get(name)
            )
            if different:
                msg = (
                    f"{self.directory} holds a run with another {', '.join(different)}; "
                    "give the same options as before, or another --work-dir"
                )
                raise WorkDirectoryError(msg)
            return
        self._write(self.directory / RECORD_NAME, json.dumps(record | {part: wanted}, indent=2).encode())

    def segment(self, segment: Segment) -> Tensor | None:
        """Return the stored targets of a segment, or None if it was not finished.

        Raises:
            WorkDirectoryError: the file is damaged.
        """
        path = self._segment_path(segment)
        if not path.exists():
            return None
        try:
            return safetensors.torch.load_file(path)["targets"]
        except (SafetensorError, KeyError, OSError) as error:
            msg = f"{path} is damaged; remove it and run again, and this segment is made anew"
            raise WorkDirectoryError(msg) from error

    def save_segment(self, segment: Segment, targets: Tensor) -> None:
        """Keep the finished targets of a segment."""
        self._write(self._segment_path(segment), safetensors.torch.save({"targets": targets.cpu().contiguous()}))

    def _segment_path(self, segment: Segment) -> Path:
        return self.directory / "segments" / f"segment_{segment.index:04d}.safetensors"

    def _record(self) -> dict[str, dict[str, str]]:
        path = self.directory / RECORD_NAME
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"{path} is damaged; use another --work-dir"
            raise WorkDirectoryError(msg) from error
        return dict(record)

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f".{path.name}.part")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            msg = f"{path} cannot be written ({error.strerror}); free some space or choose another --work-dir"
            raise OutputError(msg) from error
