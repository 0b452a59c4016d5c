"""The store keeps what it was given, whatever happens in between; numpy's own reader is the oracle."""

from __future__ import annotations

import errno
import os
import tracemalloc
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from swifti2v.errors import InvalidInputError, OutputError, WorkDirectoryError
from swifti2v.media.frame_store import FrameStore


def some_frames(count: int, seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "motion"


def filled(directory: Path, *lengths: int) -> tuple[FrameStore, np.ndarray]:
    frames = some_frames(sum(lengths))
    store = FrameStore(directory)
    start = 0
    for length in lengths:
        store.append(frames[start : start + length])
        start += length
    return store, frames


def test_frames_come_back(directory: Path) -> None:
    store, frames = filled(directory, 1, 4, 7)
    assert len(store) == 12
    assert [len(piece) for piece in store] == [1, 4, 7]
    assert np.array_equal(np.concatenate(list(store)), frames)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 1), (3, 9), (5, 5), (4, 5), (11, 99), (50, 60), (9, 3)])
def test_read_is_a_slice(directory: Path, start: int, stop: int) -> None:
    store, frames = filled(directory, 1, 4, 7)
    assert np.array_equal(store.read(start, stop), frames[start:stop])


@pytest.mark.parametrize("lengths", [[1, 4, 4, 4], [5, 5, 5], [12], [100], [2, 3]])
def test_chunks_cross_pieces(directory: Path, lengths: list[int]) -> None:
    store, frames = filled(directory, 3, 3, 7)
    chunks = list(store.chunks(lengths=lengths))
    covered = min(13, sum(lengths))
    assert np.array_equal(np.concatenate(chunks), frames[:covered])
    assert [len(chunk) for chunk in chunks[:-1]] == lengths[: len(chunks) - 1]


def test_chunks_from_the_middle_with_endless_lengths(directory: Path) -> None:
    store, frames = filled(directory, 3, 3, 7)
    chunks = list(store.chunks(5, chain([1], repeat(4))))
    assert [len(chunk) for chunk in chunks] == [1, 4, 3]
    assert np.array_equal(np.concatenate(chunks), frames[5:])


def test_pieces_are_plain_numpy_files(directory: Path) -> None:
    _, frames = filled(directory, 2, 3)
    assert np.array_equal(np.load(directory / "piece_000001.npy"), frames[2:])
    assert sorted(path.name for path in directory.iterdir()) == ["piece_000000.npy", "piece_000001.npy"]


def test_tensors_views_and_nothing(directory: Path) -> None:
    store = FrameStore(directory)
    frames = some_frames(4)
    store.append(torch.from_numpy(frames)[::2])
    store.append(frames[:0])
    assert [len(piece) for piece in store] == [2]
    assert np.array_equal(store.read(0, 9), frames[::2])


class TestReopened:
    def test_goes_on_where_it_was(self, directory: Path) -> None:
        _, frames = filled(directory, 2, 3)
        store = FrameStore(directory)
        assert len(store) == 5
        store.append(some_frames(2, seed=1))
        again = FrameStore(directory)
        assert np.array_equal(again.read(0, 99), np.concatenate([frames, some_frames(2, seed=1)]))

    def test_unfinished_piece_of_a_killed_run_does_not_count(self, directory: Path) -> None:
        filled(directory, 2)
        (directory / ".piece_000001.npy.part").write_bytes((directory / "piece_000000.npy").read_bytes()[:100])
        assert len(FrameStore(directory)) == 2
        assert [path.name for path in directory.iterdir()] == ["piece_000000.npy"]

    def test_marker_and_metadata(self, directory: Path) -> None:
        store, _ = filled(directory, 2)
        assert not store.is_complete
        with pytest.raises(WorkDirectoryError, match="not complete"):
            _ = store.metadata
        store.complete({"seed": 7, "fps": 24.0, "name": "wan2.2"})
        again = FrameStore(directory)
        assert again.is_complete
        assert again.metadata == store.metadata == {"seed": 7, "fps": 24.0, "name": "wan2.2"}
        with pytest.raises(WorkDirectoryError, match="are complete; delete"):
            again.append(some_frames(1))

    def test_cleared(self, directory: Path) -> None:
        store, _ = filled(directory, 2, 2)
        store.complete({})
        store.clear()
        assert (len(store), store.is_complete) == (0, False)
        assert list(directory.iterdir()) == []
        store.append(some_frames(3, height=4))
        assert len(FrameStore(directory)) == 3


class TestDamaged:
    def check(self, directory: Path, words: str) -> None:
        with pytest.raises(WorkDirectoryError, match=words) as caught:
            FrameStore(directory)
        assert str(caught.value).endswith("; delete this folder and run again")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kept", [0, 5, 60, 150])
    def test_truncated_piece(self, directory: Path, kept: int) -> None:
        filled(directory, 2)
        path = directory / "piece_000000.npy"
        path.write_bytes(path.read_bytes()[:kept])
        self.check(directory, r"piece_000000\.npy")

    def test_missing_piece(self, directory: Path) -> None:
        filled(directory, 1, 1, 1)
        (directory / "piece_000001.npy").unlink()
        self.check(directory, "piece 1 is missing")

    def test_missing_last_piece_of_a_complete_store(self, directory: Path) -> None:
        store, _ = filled(directory, 1, 2)
        store.complete({})
        (directory / "piece_000001.npy").unlink()
        self.check(directory, "it holds 1 of 3 frames")

    def test_piece_of_another_kind(self, directory: Path) -> None:
        filled(directory, 1)
        np.save(directory / "piece_000001.npy", np.zeros((2, 6, 8, 3), np.float32))
        self.check(directory, r"piece_000001\.npy is not whole")
        np.save(directory / "piece_000001.npy", np.zeros((2, 8, 8, 3), np.uint8))
        self.check(directory, "another size")
        np.save(directory / "piece_000001.npy", np.asfortranarray(some_frames(2)))
        self.check(directory, "is not whole")

    def test_pickle_is_never_loaded(self, directory: Path) -> None:
        filled(directory, 1)
        np.save(directory / "piece_000001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        self.check(directory, "is not whole")

    @pytest.mark.parametrize("content", ["", "[]", '{"num_frames": 1}', '{"num_frames": 1, "metadata": 3}'])
    def test_marker(self, directory: Path, content: str) -> None:
        filled(directory, 1)
        (directory / "complete.json").write_text(content)
        self.check(directory, r"complete\.json cannot be read")

    def test_damage_while_open(self, directory: Path) -> None:
        store, _ = filled(directory, 2)
        path = directory / "piece_000000.npy"
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(WorkDirectoryError, match="not whole"):
            store.read(0, 2)
        path.unlink()
        with pytest.raises(WorkDirectoryError, match="cannot be read"):
            store.read(0, 2)


class TestWriting:
    def test_full_disk_leaves_the_store_as_it_was(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, frames = filled(directory, 2)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*; free some space"):
            store.append(some_frames(3))
        monkeypatch.undo()
        assert np.array_equal(store.read(0, 99), frames)
        assert len(FrameStore(directory)) == 2
        assert len(list(directory.iterdir())) == 1

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="choose another folder"):
            FrameStore(tmp_path / "file" / "motion")

    @pytest.mark.parametrize(
        "frames",
        [
            np.zeros((1, 6, 9, 3), np.uint8),
            np.zeros((6, 8, 3), np.uint8),
            np.zeros((1, 3, 6, 8), np.uint8),
            np.zeros((1, 6, 8, 3), np.float32),
        ],
    )
    def test_frames_of_another_shape_or_type(self, directory: Path, frames: np.ndarray) -> None:
        store, _ = filled(directory, 1)
        with pytest.raises(InvalidInputError, match=r"takes uint8 \[n, 6, 8, 3\]"):
            store.append(frames)

    def test_reading_an_empty_store(self, directory: Path) -> None:
        store = FrameStore(directory)
        assert list(store) == list(store.chunks()) == []
        with pytest.raises(InvalidInputError, match="empty"):
            store.read(0, 1)


def test_memory_does_not_grow_with_length(directory: Path) -> None:
    store = FrameStore(directory)
    piece = some_frames(40, height=64, width=64)  # 0.5 MB
    for _ in range(20):
        store.append(piece)
    tracemalloc.start()
    read = sum(len(chunk) for chunk in store.chunks(lengths=repeat(4)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == 800
    assert peak_bytes < piece.nbytes
