"""Checksums of a checkpoint's files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_files import checksums, write_checksums
from swifti2v.wan.checkpoint_index import read_index
from swifti2v.wan.checkpoints import (
    resolve,
)
from tests.wan.checkpoint_edits import WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path


def test_checksums_find_any_changed_file(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no checksums"):
        resolve(checkpoint, verify=True)
    index = write_checksums(checkpoint)
    assert index == read_index(checkpoint / "swifti2v.json")
    assert index.sha256.keys() == {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    } - {"swifti2v.json"}
    resolve(checkpoint, verify=True)

    for file in (f"stage_one/transformer/{WEIGHTS}", "adapters/small.safetensors", "stage_two/vae/config.json"):
        path = checkpoint / file
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        resolve(checkpoint)
        with pytest.raises(CheckpointError, match=f"{file} differs from its checksum"):
            resolve(checkpoint, verify=True)
        path.write_bytes(kept)
    (checkpoint / "stage_two" / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        resolve(checkpoint, verify=True)
    resolve(checkpoint, verify=True, parts=["stage_one"])


def test_checksums_skip_hidden_files(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("x")
    (tmp_path / "weights").write_text("abc")
    assert checksums(tmp_path) == {"weights": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
