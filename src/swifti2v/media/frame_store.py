"""Frames on disk: the motion reference of a run, so that memory does not grow with length and a killed run can go on.

A store is a folder of pieces (``piece_000000.npy``, ...), each written under another name, flushed to the disk and
then renamed, so that a piece is there whole or not at all; ``complete.json`` marks that no more will come. Pieces are
read through file handles, only the frames asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from swifti2v.errors import InvalidInputError, OutputError, WorkDirectoryError
from swifti2v.media.atomic_files import UNFINISHED, write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_PIECE = re.compile(r"piece_(\d{6})\.npy")
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class _Piece:
    path: Path
    start: int  # index of its first frame in the store
    num_frames: int
    offset_bytes: int  # where the pixels begin in the file


class FrameStore:
    """Growing sequence of uint8 frames of one size, kept in a folder.

    Args:
        directory: made if missing; a store that is already there is opened and goes on after its last whole piece.

    Raises:
        WorkDirectoryError: the folder holds a damaged store; the message says to delete it.
        OutputError: the folder cannot be made or written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(UNFINISHED):
                leftover.unlink()
        except OSError as error:
            raise _not_written(self.directory, error) from error
        self._pieces: list[_Piece] = []
        self._frame_shape: tuple[int, int, int] | None = None
        self._open_pieces()
        self._metadata = self._read_metadata()

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._pieces[-1].start + self._pieces[-1].num_frames if self._pieces else 0

    @property
    def is_complete(self) -> bool:
        """Whether `complete` has been called."""
        return self._metadata is not None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What `complete` was given; raises `WorkDirectoryError` before that."""
        if self._metadata is None:
            msg = f"frames in {str(self.directory)!r} are not complete; run the stage that writes them to its end"
            raise WorkDirectoryError(msg)
        return self._metadata

    def append(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Add `frames`, uint8 [n, h, w, 3], as one piece that survives a crash once this returns; n = 0 adds nothing.

        Raises:
            InvalidInputError: frames of another shape or type.
            WorkDirectoryError: the store is complete.
            OutputError: the disk is full or cannot be written; the store is as before.
        """
        if self.is_complete:
            msg = f"frames in {str(self.directory)!r} are complete; delete the folder to write others"
            raise WorkDirectoryError(msg)
        array = self._checked(frames)
        if not len(array):
            return
        path = self.directory / f"piece_{len(self._pieces):06d}.npy"

        def save(file: BinaryIO) -> None:
            npy_format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

        write_atomically(path, save)
        self._add(path)

    def complete(self, metadata: Mapping[str, Any]) -> None:
        """Mark that no more frames will come and keep `metadata` (JSON values) with them."""
        content = {"num_frames": len(self), "metadata": dict(metadata)}
        write_atomically(self.directory / _COMPLETE, json.dumps(content, indent=1, sort_keys=True).encode())
        self._metadata = self._read_metadata()

    def clear(self) -> None:
        """Remove the marker and every piece: the store is empty and can be written anew."""
        (self.directory / _COMPLETE).unlink(missing_ok=True)
        self._metadata = None
        for piece in reversed(self._pieces):  # last first: a crash in between leaves a sound, shorter store
            piece.path.unlink()
        self._pieces, self._frame_shape = [], None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return frames `start` to `stop` (excluded), uint8 [n, h, w, 3]; clipped to the length as a slice is."""
        start, stop, _ = slice(start, stop).indices(len(self))
        if self._frame_shape is None:
            msg = f"frames in {str(self.directory)!r} have no size yet: the store is empty; append frames first"
            raise InvalidInputError(msg)
        frames = np.empty((max(0, stop - start), *self._frame_shape), np.uint8)
        for piece in self._pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.num_frames)
            if first < last:
                self._read_into(frames[first - start : last - start], piece, first - piece.start)
        return frames

    def chunks(self, start: int = 0, lengths: Iterable[int] = repeat(16)) -> Iterator[NDArray[np.uint8]]:
        """Yield consecutive chunks of the given lengths from frame `start` on, until the lengths or the frames end.

        The last chunk is shorter where the frames end within it. Reads one chunk at a time.
        """
        for length in lengths:
            if start >= len(self):
                return
            yield self.read(start, start + length)
            start += length

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the pieces as they were appended."""
        for piece in self._pieces:
            yield self.read(piece.start, piece.start + piece.num_frames)

    def _checked(self, frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
        array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
        known = self._frame_shape
        fits = array.ndim == 4 and array.shape[-1] == 3 and (known is None or array.shape[1:] == known)
        if array.dtype != np.uint8 or not fits:
            height, width, _ = known or ("h", "w", 3)
            msg = f"frames are {array.dtype} {list(array.shape)}; this store takes uint8 [n, {height}, {width}, 3]"
            raise InvalidInputError(msg)
        return array

    def _open_pieces(self) -> None:
        names = sorted(path.name for path in self.directory.iterdir() if _PIECE.fullmatch(path.name))
        for number, name in enumerate(names):
            if name != f"piece_{number:06d}.npy":
                raise _damaged(self.directory, f"piece {number} is missing")
            self._add(self.directory / name)

    def _add(self, path: Path) -> None:
        """Take a piece into the index by its header; its size must be what the header says."""
        try:
            with path.open("rb") as file:
                version = npy_format.read_magic(file)
                if version != (1, 0):
                    raise _damaged(self.directory, f"{path.name} has an unknown header")
                shape, column_order, dtype = npy_format.read_array_header_1_0(file)
                offset = file.tell()
                size = file.seek(0, os.SEEK_END)
        except (OSError, ValueError) as error:
            if isinstance(error, WorkDirectoryError):
                raise
            raise _damaged(self.directory, f"{path.name} cannot be read") from error
        if dtype != np.uint8 or len(shape) != 4 or column_order or size != offset + int(np.prod(shape, dtype=np.int64)):
            raise _damaged(self.directory, f"{path.name} is not whole")
        if self._frame_shape not in (None, shape[1:]):
            raise _damaged(self.directory, f"{path.name} has frames of another size")
        self._frame_shape = (shape[1], shape[2], shape[3])
        self._pieces.append(_Piece(path, len(self), shape[0], offset))

    def _read_into(self, target: NDArray[np.uint8], piece: _Piece, first: int) -> None:
        frame_bytes = target[0].nbytes
        try:
            with piece.path.open("rb") as file:
                file.seek(piece.offset_bytes + first * frame_bytes)
                count = file.readinto(target.data)
        except OSError as error:
            raise _damaged(self.directory, f"{piece.path.name} cannot be read") from error
        if count != target.nbytes:
            raise _damaged(self.directory, f"{piece.path.name} is not whole")

    def _read_metadata(self) -> Mapping[str, Any] | None:
        path = self.directory / _COMPLETE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            num_frames, metadata = content["num_frames"], dict(content["metadata"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.directory, f"{_COMPLETE} cannot be read") from error
        if num_frames != len(self):
            raise _damaged(self.directory, f"it holds {len(self)} of {num_frames} frames")
        return metadata


def _damaged(directory: Path, problem: str) -> WorkDirectoryError:
    return WorkDirectoryError(f"frames in {str(directory)!r} are damaged: {problem}; delete this folder and run again")


def _not_written(directory: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(
        f"frames cannot be written to {str(directory)!r} ({reason}); free space there or choose another folder"
    )
