"""What a run leaves on disk so that it can be resumed: the prompt, the motion reference and every finished segment.

```
work-dir/
  run.json                  image, prompt, checkpoint and settings that the contents belong to
  prompt_*.safetensors      the prompt as the networks read it; the name tells the texts apart
  motion_reference/         uint8 frames, a piece for each chunk of Stage I (`media/frame_store.py`)
  segments/segment_0000.safetensors   targets of a segment, float32
  segments/segment_0000_frames.safetensors   of `light`: its frames, uint8, and the network's hidden state
```
Every file is written beside its name and renamed, so that a run that is killed leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from swifti2v.errors import OutputError, WorkDirectoryError
from swifti2v.light.refine import FinishedSegment
from swifti2v.media.atomic_files import write_atomically
from swifti2v.media.directory_lock import directory_lock
from swifti2v.media.frame_store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from swifti2v.segments import Segment
    from swifti2v.stage_two import FinishedLatents

RECORD_NAME = "run.json"


class WorkDirectory:
    """The files of one run in `directory`, which is made if it does not exist.

    `prompt`, `motion_reference` and `keep_segments` return what is kept, and make and keep it if it is not there yet.

    Raises:
        OutputError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, *, is_temporary: bool = False) -> None:
        self.directory = directory
        self.is_temporary = is_temporary
        try:
            (directory / "segments").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the work directory {directory} cannot be made ({error.strerror}); choose one that is writable"
            raise OutputError(msg) from error
        self.motion = FrameStore(directory / "motion_reference")

    @classmethod
    @contextmanager
    def open(cls, directory: str | Path | None) -> Iterator[WorkDirectory]:
        """Open `directory` for this run alone, or a temporary one that is removed at the end."""
        if directory is not None:
            work = cls(Path(directory))
            with directory_lock(work.directory):
                yield work
            return
        try:
            temporary = TemporaryDirectory(prefix="swifti2v-")
        except OSError as error:
            msg = f"no temporary directory can be made ({error.strerror}); give a writable --work-dir"
            raise OutputError(msg) from error
        with temporary:
            yield cls(Path(temporary.name), is_temporary=True)

    def claim_motion(self, identity: Mapping[str, Any]) -> None:
        """Record what decides the motion reference, or check that it is what was recorded.

        Raises:
            WorkDirectoryError: the directory holds a finished motion reference, or segments, of another run; the
                message names what differs. Where nothing is finished, nothing is lost, and the record is replaced.
        """
        self._claim("stage_one", identity, held=self.motion.is_complete or self.has_segments)

    def claim_segments(self, identity: Mapping[str, Any]) -> None:
        """Record what decides the segments beyond the motion reference, or check it, as `claim_motion` does.

        So Stage II may be set otherwise after a preview, until its first segment is finished.
        """
        self._claim("stage_two", identity, held=self.has_segments)

    def prompt(self, texts: Sequence[str | None], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what the text encoder makes of `texts`: ``make()``, or what an earlier run has kept of it.

        Raises:
            WorkDirectoryError: the file is damaged.
        """
        path = self._prompt_path(texts)
        if not path.exists():
            made = dict(make())
            held = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            write_atomically(path, safetensors.torch.save(held))
            return made
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            msg = f"{path} is damaged; remove it and run again, and the prompt is read anew"
            raise WorkDirectoryError(msg) from error

    def motion_reference(self, make: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
        """Return the motion reference in pieces, uint8 [n,h,w,3]; first keep all of ``make()`` if none is complete."""
        if not self.motion.is_complete:
            self.motion.clear()
            for piece in make():
                self.motion.append(piece)
            self.motion.complete({})
        return map(torch.from_numpy, self.motion.chunks())

    def keep_segments(self, finished: Iterable[FinishedLatents]) -> Iterator[Tensor]:
        """Keep the targets of each segment that is not kept yet; yield all latents as they come."""
        for item in finished:
            if item.segment is not None and not self._segment_path(item.segment).exists():
                targets = {"targets": item.latents.cpu().contiguous()}
                write_atomically(self._segment_path(item.segment), safetensors.torch.save(targets))
            yield item.latents
            del item  # or it would live on while the next segment is made

    def segment(self, segment: Segment) -> Tensor | None:
        """Return the targets of a segment that is kept, or None if it was not finished.

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

    def keep_frames_of_segment(self, segment: FinishedSegment) -> None:
        """Keep a segment that `light` has finished; a temporary directory keeps none, as nobody can go on from it."""
        if not self.is_temporary:
            tensors = {"frames": segment.frames.contiguous(), "hidden": segment.hidden.contiguous()}
            write_atomically(self._frames_path(segment.index), safetensors.torch.save(tensors))

    def frames_of_segment(self, index: int) -> FinishedSegment | None:
        """Return a segment of `light` that is kept, or None if it was not finished.

        Raises:
            WorkDirectoryError: the file is damaged.
        """
        path = self._frames_path(index)
        if not path.exists():
            return None
        try:
            kept = safetensors.torch.load_file(path)
            return FinishedSegment(index, kept["frames"], kept["hidden"])
        except (SafetensorError, KeyError, OSError) as error:
            msg = f"{path} is damaged; remove it and those after it and run again, and they are made anew"
            raise WorkDirectoryError(msg) from error

    def has_stage_one(self, texts: Sequence[str | None]) -> bool:
        """Whether a Stage II that has no text encoder can go on from here with these texts."""
        return self.motion.is_complete and self._prompt_path(texts).exists()

    @property
    def is_ready_for_stage_two(self) -> bool:
        """Whether a Stage II without text encoder can go on from here."""
        return self.motion.is_complete and any(self.directory.glob("prompt_*.safetensors"))

    @property
    def has_segments(self) -> bool:
        """Whether any segment is finished."""
        return any((self.directory / "segments").glob("segment_*.safetensors"))

    def _claim(self, part: str, identity: Mapping[str, Any], *, held: bool) -> None:
        record = self._record()
        wanted = {name: str(value) for name, value in identity.items()}
        if record.get(part) == wanted:
            return
        if held:
            known = record.get(part, {})
            different = sorted(name for name in wanted.keys() | known.keys() if wanted.get(name) != known.get(name))
            msg = (
                f"{self.directory} holds a run with another {', '.join(different)}; "
                "give the same options as before, or another --work-dir"
            )
            if not known:
                msg = f"{self.directory} holds results but no record of what they belong to; use another --work-dir"
            raise WorkDirectoryError(msg)
        if part == "stage_one":  # the prompt may have been read by another checkpoint
            for path in self.directory.glob("prompt_*.safetensors"):
                path.unlink()
        write_atomically(self.directory / RECORD_NAME, json.dumps(record | {part: wanted}, indent=2).encode())

    def _prompt_path(self, texts: Sequence[str | None]) -> Path:
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
        return self.directory / f"prompt_{digest[:16]}.safetensors"

    def _frames_path(self, index: int) -> Path:
        return self.directory / "segments" / f"segment_{index:04d}_frames.safetensors"

    def _segment_path(self, segment: Segment) -> Path:
        return self.directory / "segments" / f"segment_{segment.index:04d}.safetensors"

    def _record(self) -> dict[str, dict[str, str]]:
        path = self.directory / RECORD_NAME
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {part: dict(identity) for part, identity in record.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            msg = f"{path} is damaged; use another --work-dir"
            raise WorkDirectoryError(msg) from error
