"""The checkpoints of a run: the newest, from which it resumes, and those that are to be kept.

```
RUN/checkpoint.pt                    the newest; replaced in one step, so it is whole at every moment
RUN/checkpoints/step_000400.pt       kept ones; put one in the place of checkpoint.pt to go back to it
```
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swifti2v.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECKPOINT_NAME = "checkpoint.pt"
KEPT_FOLDER = "checkpoints"
KEYS = frozenset({"step", "module", "average", "optimizer"})
_KEPT_NAME = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a run keeps its checkpoints.

    Args:
        folder: of the run.
        keep_last: checkpoints to keep, the newest included.
        keep_every: keep those of these steps for good; 0: none.
    """

    folder: Path
    keep_last: int = 1
    keep_every: int = 0

    @property
    def newest(self) -> Path:
        """The file from which the run resumes."""
        return self.folder / CHECKPOINT_NAME

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint (its keys are `KEYS`), then drop what is not to be kept.

        Raises:
            OutputError: it cannot be written; the one before it is as it was.
        """
        partial = self.folder / f".{CHECKPOINT_NAME}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.newest)
            self._keep(state["step"])
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            partial.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            msg = f"cannot write {self.newest} ({reason}); make room and start again: the run goes on from the last one"
            raise OutputError(msg) from error

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint, its tensors mapped from the file; None if there is none.

        Raises:
            CheckpointError: the file is damaged or is no checkpoint of a training run.
        """
        if not self.newest.exists():
            return None
        try:
            state = torch.load(self.newest, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load documents no set of exceptions for damaged files
            msg = f"cannot read {self.newest} ({type(error).__name__}); {self._way_back()}"
            raise CheckpointError(msg) from error
        if not isinstance(state, dict) or not state.keys() >= KEYS:
            msg = f"{self.newest} is not a checkpoint of a training run; {self._way_back()}"
            raise CheckpointError(msg)
        return state

    def kept(self) -> dict[int, Path]:
        """Return the kept checkpoints by step, in order."""
        found = {int(match[1]): path for path, match in self._kept_files()}
        return dict(sorted(found.items()))

    def _kept_files(self) -> list[tuple[Path, re.Match[str]]]:
        files = (self.folder / KEPT_FOLDER).glob("step_*.pt")
        return [(path, match) for path in files if (match := _KEPT_NAME.fullmatch(path.name))]

    def _keep(self, step: int) -> None:
        if self.keep_last <= 1 and not self.keep_every:
            return
        path = self.folder / KEPT_FOLDER / f"step_{step:06d}.pt"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.hardlink_to(self.newest)
        except OSError:  # a file system without links
            shutil.copyfile(self.newest, path)
        # Files of later steps are there after going back; they are not this run's past and are left alone.
        past = [kept for kept in self.kept() if kept <= step]
        recent = set(past[-self.keep_last :])
        for kept, file in self.kept().items():
            if kept <= step and kept not in recent and not (self.keep_every and kept % self.keep_every == 0):
                file.unlink()

    def _way_back(self) -> str:
        kept = [str(path) for path in self.kept().values()]
        return f"put {kept[-1]} in its place" if kept else "delete it to start from the beginning"
