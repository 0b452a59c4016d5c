"""The index of a checkpoint: written, read again, and strict."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_index import CheckpointIndex, read_index, write_index
from swifti2v.wan.checkpoints import (
    resolve,
)
from tests.wan.checkpoint_edits import edit_index

if TYPE_CHECKING:
    from pathlib import Path


def test_index_survives_the_round_trip(tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = CheckpointIndex.from_json(json.loads((tiny_checkpoint / "swifti2v.json").read_text()))
    assert index.stage_one.adapters[0].scale == 0.5
    assert index.stage_one.few_step_sigmas == (1.0, 0.9375, 5 / 6, 0.625)
    write_index(index, tmp_path / "swifti2v.json")
    assert read_index(tmp_path / "swifti2v.json") == index


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 2, "format is 2.*update"),
        (("stage_two", "neighbours"), 1, "unknown key 'neighbours'"),
        (("stage_one", "adapters", 0, "strength"), 1, "unknown key 'strength'"),
        (("stage_one", "adapters", 0, "expert"), "medium", "medium"),
        (("stage_one", "source"), "somewhere", "somewhere"),
        (("stage_one", "source"), "./../elsewhere", "not a path below"),
        (("stage_one", "adapters", 0, "weight_name"), "/etc/passwd", "not a path below"),
        (("stage_one", "revision"), "main", "revision"),
        (("stage_one", "few_step_sigmas"), [0.5, 0.9], "few_step_sigmas"),
        (("stage_one", "window_frames"), 80, "4k\\+1"),
        (("stage_two", "sigma_start"), 1.5, "sigma_start"),
        (("stage_two", "refiner"), "magic", "magic"),
        (("stage_two", "segment_size"), "3", "segment_size"),
        (("defaults", "fps"), 0, "fps is 0"),
        (("sha256",), {"a": "0"}, "64 hexadecimal"),
    ],
)
def test_index_is_strict(checkpoint: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    def change(data: dict[str, Any]) -> None:
        for step in place[:-1]:
            data = data[step]
        data[place[-1]] = value

    edit_index(checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(checkpoint)
    assert str(checkpoint / "swifti2v.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_with_a_key_given_twice(checkpoint: Path) -> None:
    text = (checkpoint / "swifti2v.json").read_text()
    (checkpoint / "swifti2v.json").write_text('{"format": 1, ' + text[1:])
    with pytest.raises(CheckpointError, match="given twice"):
        resolve(checkpoint)
