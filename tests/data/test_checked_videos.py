"""What was found out about videos, kept: nothing is decoded twice, unless it changed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from swifti2v.data import validation
from swifti2v.data.checked_videos import VIDEOS_OF_A_FILE, check_and_keep, read_checked
from swifti2v.data.manifest import ManifestEntry
from swifti2v.data.validation import ValidationOptions, report_of, validate_videos
from swifti2v.errors import LatentCacheError

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = ValidationOptions(min_frames=17, min_short_side_pixels=48)


@pytest.fixture
def entries(tmp_path: Path, write_video: Any, moving: Any) -> list[ManifestEntry]:
    """A good video, a copy of it, one with a cut, a short one, and a text file."""
    write_video(tmp_path / "a.mp4", moving(20, seed=1))
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    write_video(tmp_path / "c.mp4", np.concatenate([moving(18, seed=2), moving(19, seed=3)]))
    write_video(tmp_path / "d.mp4", moving(4))
    (tmp_path / "e.mp4").write_text("no video")
    return [ManifestEntry(f"{name}.mp4", tmp_path / f"{name}.mp4", f"prompt {name}") for name in "abcde"]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a reader is opened for."""
    names: list[str] = []
    real = validation.VideoReader

    class Counting(real):  # type: ignore[misc,valid-type]
        def __init__(self, path: Path, **options: Any) -> None:
            names.append(path.name)
            super().__init__(path, **options)

    monkeypatch.setattr(validation, "VideoReader", Counting)
    return names


def test_what_is_kept_gives_the_report_of_reading_them(
    tmp_path: Path, entries: list[ManifestEntry], decoded: list[str]
) -> None:
    expected = validate_videos(entries, OPTIONS)
    assert expected.counts == {"copy of another": 1, "too short": 1, "unreadable": 1}
    assert check_and_keep(entries, OPTIONS, folder=tmp_path / "kept").keys() == {entry.name for entry in entries}
    decoded.clear()
    known = read_checked(tmp_path / "kept", entries, OPTIONS)
    assert report_of(entries, known, OPTIONS) == expected
    assert decoded == []


def test_captions_may_change_and_files_may_not(tmp_path: Path, entries: list[ManifestEntry]) -> None:
    check_and_keep(entries, OPTIONS, folder=tmp_path / "kept")
    entries[0] = replace(entries[0], prompt="another")
    status = entries[2].path.stat()
    os.utime(entries[2].path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the time alone
    content = entries[3].path.read_bytes()
    status = entries[3].path.stat()
    entries[3].path.write_bytes(content + b"\0")
    os.utime(entries[3].path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the size alone
    entries[4].path.unlink()
    known = read_checked(tmp_path / "kept", entries, OPTIONS)
    assert sorted(known) == ["a.mp4", "b.mp4"]
    assert known["a.mp4"].verdict.scenes[0].prompt == "another"


def test_a_changed_video_is_read_again_and_the_newer_record_holds(
    tmp_path: Path, entries: list[ManifestEntry], write_video: Any, moving: Any
) -> None:
    check_and_keep(entries, OPTIONS, folder=tmp_path / "kept")
    write_video(entries[3].path, moving(30))  # it was too short
    check_and_keep([entries[3]], OPTIONS, folder=tmp_path / "kept")
    known = read_checked(tmp_path / "kept", entries, OPTIONS)
    assert [scene.num_frames for scene in known["d.mp4"].verdict.scenes] == [30]
    assert report_of(entries, known, OPTIONS) == validate_videos(entries, OPTIONS)


def test_a_copy_stands_for_itself_when_its_original_is_gone(tmp_path: Path, entries: list[ManifestEntry]) -> None:
    check_and_keep(entries, OPTIONS, folder=tmp_path / "kept")
    known = read_checked(tmp_path / "kept", entries[1:], OPTIONS)
    assert known.keys() == {"b.mp4", "c.mp4", "d.mp4", "e.mp4"}
    assert report_of(entries[1:], known, OPTIONS).scenes[0].name == "b.mp4"


def test_other_options_see_nothing_and_leave_it(tmp_path: Path, entries: list[ManifestEntry]) -> None:
    check_and_keep(entries, OPTIONS, folder=tmp_path / "kept")
    others = replace(OPTIONS, min_frames=4)
    assert read_checked(tmp_path / "kept", entries, others) == {}
    check_and_keep(entries, others, folder=tmp_path / "kept")
    for options in (OPTIONS, others):
        known = read_checked(tmp_path / "kept", entries, options)
        assert report_of(entries, known, options) == validate_videos(entries, options)


def test_an_interrupted_check_keeps_what_is_done(tmp_path: Path, entries: list[ManifestEntry]) -> None:
    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_and_keep(entries, OPTIONS, folder=tmp_path / "kept", on_video=stop)
    known = read_checked(tmp_path / "kept", entries, OPTIONS)
    assert len(known) == 3


def test_a_kill_loses_no_more_than_one_file(
    tmp_path: Path, entries: list[ManifestEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at in the midst of it: every full file is on the disk before the next video is taken."""
    many = [replace(entries[4], name=f"{number}.mp4") for number in range(2 * VIDEOS_OF_A_FILE + 1)]
    on_disk: list[int] = []

    def look(_done: int, _total: int) -> None:
        on_disk.append(len(read_checked(tmp_path / "kept", many, OPTIONS)))

    check_and_keep(many, OPTIONS, folder=tmp_path / "kept", on_video=look)
    assert on_disk == [done // VIDEOS_OF_A_FILE * VIDEOS_OF_A_FILE for done in range(1, len(many) + 1)]
    assert len(read_checked(tmp_path / "kept", many, OPTIONS)) == len(many)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"videos": {}}', b"\xff"])
def test_damage_is_named(tmp_path: Path, entries: list[ManifestEntry], damage: bytes) -> None:
    check_and_keep(entries, OPTIONS, folder=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(damage)
    with pytest.raises(LatentCacheError, match=rf"{path.name}.* is damaged; remove it and start again"):
        read_checked(tmp_path / "kept", entries, OPTIONS)
