"""Checkpoints on disk: never torn, pruned by the policy, errors that say what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from swifti2v.errors import CheckpointError, OutputError
from swifti2v.training.engine.checkpoints import CheckpointFolder


def state(step: int) -> dict:
    return {"step": step, "module": {"weight": torch.full((2,), float(step))}, "average": {}, "optimizer": {}}


def saved(folder: CheckpointFolder, *steps: int) -> CheckpointFolder:
    for step in steps:
        folder.save(state(step))
    return folder


def test_the_newest_is_read_back(tmp_path) -> None:
    loaded = saved(CheckpointFolder(tmp_path), 1, 2).load()
    assert loaded["step"] == 2
    assert torch.equal(loaded["module"]["weight"], torch.tensor([2.0, 2.0]))


def test_one_file_is_all_there_is_by_default(tmp_path) -> None:
    saved(CheckpointFolder(tmp_path), 1, 2, 3)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(2, 0, [500, 600]), (1, 300, [300, 600]), (2, 200, [200, 400, 500, 600]), (9, 0, [100, 200, 300, 400, 500, 600])],
)
def test_the_policy_decides_which_are_kept(tmp_path, last, every, kept) -> None:
    folder = saved(CheckpointFolder(tmp_path, last, every), 100, 200, 300, 400, 500, 600)
    assert list(folder.kept()) == kept
    assert [torch.load(path)["step"] for path in folder.kept().values()] == kept


def test_going_back_leaves_later_files_alone(tmp_path) -> None:
    folder = saved(CheckpointFolder(tmp_path, keep_last=2), 100, 200, 300)
    folder.kept()[200].replace(folder.newest)
    saved(folder, 250)
    assert list(folder.kept()) == [250, 300]
    assert folder.load()["step"] == 250


def test_kept_files_are_copies_where_links_are_not_to_be_had(tmp_path, monkeypatch) -> None:
    def refuse(*_arguments) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = saved(CheckpointFolder(tmp_path, keep_last=2), 1, 2)
    assert [torch.load(path)["step"] for path in folder.kept().values()] == [1, 2]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path) -> None:
    folder = saved(CheckpointFolder(tmp_path), 1)

    class FullDisk:
        def __reduce__(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"checkpoint\.pt \(.*No space left.*\); make room"):
        folder.save(state(2) | {"module": FullDisk()})
    assert folder.load()["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_damaged_checkpoint_names_the_way_back(tmp_path) -> None:
    folder = saved(CheckpointFolder(tmp_path), 1)
    folder.newest.write_bytes(folder.newest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete it to start from the beginning"):
        folder.load()
    kept = saved(CheckpointFolder(tmp_path, keep_last=2), 1, 2)
    kept.newest.unlink()
    kept.newest.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"put .*step_000002\.pt in its place"):
        kept.load()


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run"):
        CheckpointFolder(tmp_path).load()
    assert CheckpointFolder(tmp_path / "new").load() is None
