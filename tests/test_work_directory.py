"""What a run leaves on disk: whole files only, of one run only."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from swifti2v.errors import OutputError, WorkDirectoryError
from swifti2v.segments import plan_segments
from swifti2v.stage_two import FinishedLatents
from swifti2v.work_directory import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.segments import Segment

PLAN = plan_segments(7)
MOTION = {"prompt": "pan left", "seed": 1}
SEGMENTS = {"num_inference_steps": 4}


def keep(store: WorkDirectory, segment: Segment, targets: torch.Tensor) -> None:
    (yielded,) = store.keep_segments([FinishedLatents(segment, targets)])
    assert yielded is targets


def finish_motion(store: WorkDirectory) -> None:
    store.motion.append(np.zeros((5, 4, 4, 3), np.uint8))
    store.motion.complete({})


def finished(directory: Path) -> WorkDirectory:
    store = WorkDirectory(directory)
    store.claim_motion(MOTION)
    finish_motion(store)
    store.claim_segments(SEGMENTS)
    keep(store, PLAN[0], torch.randn(1, 4, 3, 2, 2))
    return store


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_segments_come_back_bit_for_bit(tmp_path: Path) -> None:
    store = WorkDirectory(tmp_path)
    assert not store.has_segments
    assert store.segment(PLAN[0]) is None
    targets = torch.randn(1, 4, 3, 2, 2).transpose(3, 4)
    keep(store, PLAN[0], targets)
    again = WorkDirectory(tmp_path)
    assert torch.equal(again.segment(PLAN[0]), targets)
    assert again.segment(PLAN[0]) is not None
    assert again.has_segments
    assert again.segment(PLAN[1]) is None
    assert again.segment(PLAN[1]) is None
    assert [path.name for path in (tmp_path / "segments").iterdir()] == ["segment_0000.safetensors"]


def test_the_same_run_may_claim_again(tmp_path: Path) -> None:
    finished(tmp_path)
    again = WorkDirectory(tmp_path)
    again.claim_motion(MOTION)
    again.claim_segments(SEGMENTS)
    assert again.segment(PLAN[0]) is not None


def test_another_run_is_told_what_differs(tmp_path: Path) -> None:
    finished(tmp_path)
    again = WorkDirectory(tmp_path)
    with pytest.raises(WorkDirectoryError, match="another prompt, seed; give the same"):
        again.claim_motion({"prompt": "pan right", "seed": 2})
    with pytest.raises(WorkDirectoryError, match="another num_inference_steps;"):
        again.claim_segments({"num_inference_steps": 2})
    with pytest.raises(WorkDirectoryError, match="another fps;"):  # an option that this version added
        again.claim_motion(MOTION | {"fps": 24})
    again.claim_motion(MOTION)  # the record was not touched


def test_nothing_finished_is_nothing_to_lose(tmp_path: Path) -> None:
    store = WorkDirectory(tmp_path)
    store.claim_motion(MOTION)
    store.motion.append(np.zeros((5, 4, 4, 3), np.uint8))
    store.claim_motion(MOTION | {"seed": 2})
    finish_motion(store)
    with pytest.raises(WorkDirectoryError, match="another seed"):
        store.claim_motion(MOTION)
    store.claim_segments(SEGMENTS)
    store.claim_segments({"num_inference_steps": 2})
    keep(store, PLAN[0], torch.zeros(1, 4, 3, 2, 2))
    with pytest.raises(WorkDirectoryError, match="another num_inference_steps"):
        store.claim_segments(SEGMENTS)


def test_segments_alone_still_belong_to_their_motion(tmp_path: Path) -> None:
    """Whoever removes the motion reference to have it made anew must not get the old segments behind it."""
    store = finished(tmp_path)
    store.motion.clear()
    with pytest.raises(WorkDirectoryError, match="another seed"):
        WorkDirectory(tmp_path).claim_motion(MOTION | {"seed": 2})


def test_results_without_a_record_are_not_taken(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(WorkDirectoryError, match="no record"):
        WorkDirectory(tmp_path).claim_motion(MOTION)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '{"stage_one": 1}', "\xff"])
def test_damaged_record(tmp_path: Path, content: str) -> None:
    finished(tmp_path)
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(WorkDirectoryError, match=r"run\.json is damaged; use another"):
        WorkDirectory(tmp_path).claim_motion(MOTION)


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
def test_damaged_segment(tmp_path: Path, damage: bytes | None) -> None:
    store = finished(tmp_path)
    path = tmp_path / "segments" / "segment_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    with pytest.raises(WorkDirectoryError, match=r"segment_0000\.safetensors is damaged; remove it"):
        store.segment(PLAN[0])
    path.unlink()
    assert store.segment(PLAN[0]) is None


def test_full_disk_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = finished(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
        keep(store, PLAN[1], torch.zeros(1, 4, 3, 2, 2))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    record = json.loads((tmp_path / "run.json").read_text())
    assert record == {"stage_one": {"prompt": "pan left", "seed": "1"}, "stage_two": {"num_inference_steps": "4"}}


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    """Of a prompt, and of a motion reference that is complete; the prompt of another checkpoint is read anew."""
    made: list[str] = []

    def embeds() -> dict[str, torch.Tensor]:
        made.append("prompt")
        return {"prompt": torch.ones(1, 3, 2)}

    def motion() -> list[torch.Tensor]:
        made.append("motion")
        return [torch.ones(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, 4, 3, dtype=torch.uint8)]

    for _ in range(2):
        store = WorkDirectory(tmp_path)
        store.claim_motion(MOTION)
        assert torch.equal(store.prompt(("pan", None), embeds)["prompt"], torch.ones(1, 3, 2))
        assert torch.equal(torch.cat(list(store.motion_reference(motion))), torch.cat(motion()[:2]))
        made.pop()
        assert store.has_stage_one(("pan", None))
        assert not store.has_stage_one(("pan", "blurry"))
    assert made == ["prompt", "motion"]
    store.motion.clear()
    store.claim_motion(MOTION | {"checkpoint": "another"})
    store.prompt(("pan", None), embeds)
    assert made == ["prompt", "motion", "prompt"]


def test_work_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"cannot be made.*writable"):
            WorkDirectory(path)


def test_without_a_directory_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with WorkDirectory.open(None) as store:
        keep(store, PLAN[0], torch.zeros(1, 4, 3, 2, 2))
        assert store.directory.parent == tmp_path
        assert store.segment(PLAN[0]) is not None
    assert not list(tmp_path.iterdir())
    with WorkDirectory.open(tmp_path / "kept") as store:
        keep(store, PLAN[0], torch.zeros(1, 4, 3, 2, 2))
    assert (tmp_path / "kept" / "segments" / "segment_0000.safetensors").is_file()


def test_no_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match=r"no temporary directory.*--work-dir"), WorkDirectory.open(None):
        pass
