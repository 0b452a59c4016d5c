"""Files of jobs: names of ours only, work handed on from claim to claim, what is left when a job is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import PIL.Image
import pytest

from swifti2v.errors import JobError, OutputError
from swifti2v.jobs import files as files_module
from swifti2v.jobs.files import JobFiles
from swifti2v.jobs.state import new_job_id

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "data")


@pytest.fixture
def job_id() -> str:
    return new_job_id()


@pytest.mark.parametrize("name", ["", "..", "../../etc", "/etc/passwd", "video_", "video_" + "0" * 31 + "/", "a\0b"])
def test_other_names_never_become_paths(files: JobFiles, name: str) -> None:
    with pytest.raises(JobError):
        files.directory(name)
    with pytest.raises(JobError):
        files.remove(name)


def test_the_picture_is_kept_pixel_for_pixel(files: JobFiles, job_id: str) -> None:
    picture = PIL.Image.effect_noise((31, 17), 90).convert("RGB")
    files.add_input(job_id, picture)
    with PIL.Image.open(files.input(job_id)) as kept:
        assert (kept.mode, kept.tobytes()) == ("RGB", picture.tobytes())
    assert [path.name for path in files.directory(job_id).iterdir()] == ["input.png"]


@pytest.mark.parametrize("has_links", [True, False])
def test_finished_work_is_handed_on(
    files: JobFiles, job_id: str, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def refuse(*_paths: object) -> None:
            raise OSError

        monkeypatch.setattr(files_module.os, "link", refuse)
    first = files.begin_attempt(job_id, 1)
    (first.work / "segments").mkdir(parents=True)
    (first.work / "segments" / "whole").write_text("1")
    for name in (".segment.part", "piece.npy.unfinished"):
        (first.work / "segments" / name).write_text("half")
    second = files.begin_attempt(job_id, 2)
    assert [path.name for path in (second.work / "segments").iterdir()] == ["whole"]

    # The old worker was not dead after all, and writes as the run store does: beside the name, then over it.
    beside = first.work / "segments" / ".whole.part"
    beside.write_text("another")
    beside.replace(first.work / "segments" / "whole")
    assert (second.work / "segments" / "whole").read_text() == "1"


def test_the_latest_claim_hands_on(files: JobFiles, job_id: str) -> None:
    for claim in range(1, 13):  # 10 comes after 9, not after 1
        work = files.begin_attempt(job_id, claim).work
        work.mkdir(exist_ok=True)
        assert sorted(path.name for path in work.iterdir()) == [f"from_{number:02d}" for number in range(1, claim)]
        (work / f"from_{claim:02d}").touch()


def test_only_the_result_stays(files: JobFiles, job_id: str) -> None:
    for claim in (1, 2):
        attempt = files.begin_attempt(job_id, claim)
        attempt.work.mkdir(exist_ok=True)
        attempt.video.write_bytes(b"v" * claim)
    files.keep_only(job_id, 2)
    left = sorted(str(path.relative_to(files.directory(job_id))) for path in files.directory(job_id).rglob("*"))
    assert left == ["attempt_0002", "attempt_0002/video.mp4"]
    assert files.size_bytes(job_id) == 2
    files.clear_attempts(job_id)
    assert list(files.directory(job_id).iterdir()) == []
    assert list(files.ids()) == [job_id]
    files.remove(job_id)
    assert list(files.ids()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        JobFiles(tmp_path / "file")
