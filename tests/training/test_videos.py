"""Which clips a recipe trains on: found out once, by all processes together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.data import validation
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from tests.training.planning_processes import SELECTION
from tests.training.torchrun import run_on

if TYPE_CHECKING:
    from swifti2v.training.videos import VideoSelection

SCRIPT = Path(__file__).with_name("planning_processes.py")
USABLE = ["0.mp4@0", "1.mp4@0", "2.mp4@0", "3.mp4@0"]


def write_video(path: Path, seed: int, *, num_frames: int = 12) -> None:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 20, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (160, 64), interpolation=cv2.INTER_CUBIC)
    with VideoWriter(path, size=Size(96, 64), fps=16) as writer:
        writer.write(np.stack([wide[:, 4 * t : 4 * t + 96] for t in range(num_frames)]))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four usable videos, a short one, and a text file."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in range(4):
        write_video(folder / f"{seed}.mp4", seed)
    write_video(folder / "4.mp4", 4, num_frames=5)
    (folder / "5.mp4").write_text("no video")
    for number in range(6):
        (folder / f"{number}.txt").write_text("blobs slide")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that are opened to be checked."""
    names: list[str] = []
    real = validation.VideoReader

    def counting(path: Path, *, fps: float) -> validation.VideoReader:
        names.append(path.name)
        return real(path, fps=fps)

    monkeypatch.setattr(validation, "VideoReader", counting)
    return names


def clips(videos: Path, output: Path | None, selection: VideoSelection = SELECTION) -> list[str]:
    return [request.name for request in selection.requests(videos, size_multiple=16, report=output)]


def test_the_second_run_reads_nothing(videos: Path, tmp_path: Path, opened: list[str]) -> None:
    assert clips(videos, tmp_path / "cache") == USABLE
    assert sorted(opened) == [f"{number}.mp4" for number in range(6)]
    report = (tmp_path / "cache" / "data.json").read_text()
    assert json.loads(report)["skipped_by_reason"] == {"too short": 1, "unreadable": 1}
    (tmp_path / "cache" / "data.json").unlink()
    opened.clear()
    assert clips(videos, tmp_path / "cache") == USABLE
    assert opened == []
    assert (tmp_path / "cache" / "data.json").read_text() == report


def test_only_what_changed_is_read_again(videos: Path, tmp_path: Path, opened: list[str]) -> None:
    clips(videos, tmp_path / "cache")
    opened.clear()
    write_video(videos / "4.mp4", 4)
    write_video(videos / "6.mp4", 6)
    (videos / "6.txt").write_text("blobs slide")
    (videos / "1.txt").write_text("another caption")
    (videos / "0.mp4").unlink()
    requests = SELECTION.requests(videos, size_multiple=16, report=tmp_path / "cache")
    assert {request.name: request.prompt for request in requests} == {
        "1.mp4@0": "another caption", "2.mp4@0": "blobs slide", "3.mp4@0": "blobs slide", "4.mp4@0": "blobs slide",
        "6.mp4@0": "blobs slide",
    }  # fmt: skip
    assert sorted(opened) == ["4.mp4", "6.mp4"]


def test_other_options_read_anew(videos: Path, tmp_path: Path, opened: list[str]) -> None:
    clips(videos, tmp_path / "cache")
    opened.clear()
    shorter = replace(SELECTION, clips=replace(SELECTION.clips, num_frames=5))
    assert clips(videos, tmp_path / "cache", shorter) == [*USABLE, "4.mp4@0"]
    assert len(opened) == 6


def test_without_a_folder_nothing_is_kept(videos: Path, opened: list[str]) -> None:
    for _ in range(2):
        opened.clear()
        assert clips(videos, None) == USABLE
        assert len(opened) == 6


def test_nothing_usable(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="see why with `swifti2v data check`"):
        clips(videos, tmp_path / "cache", replace(SELECTION, width=192, height=128))


@pytest.mark.slow
def test_two_processes_divide_the_videos_and_agree(videos: Path, tmp_path: Path) -> None:
    results, cache = tmp_path / "results", tmp_path / "cache"
    results.mkdir()
    run_on(2, SCRIPT, videos, cache, results)

    def found(run: str) -> list[dict[str, list[str]]]:
        return [json.loads((results / f"{run}{rank}.json").read_text()) for rank in range(2)]

    assert [each["clips"] for run in ("first", "second") for each in found(run)] == [USABLE] * 4
    shares = [each["opened"] for each in found("first")]
    assert [len(share) for share in shares] == [3, 3]
    assert sorted(shares[0] + shares[1]) == [f"{number}.mp4" for number in range(6)]
    assert [each["opened"] for each in found("second")] == [[], []]
    assert clips(videos, tmp_path / "alone") == USABLE
    assert (cache / "data.json").read_text() == (tmp_path / "alone" / "data.json").read_text()
