"""Videos with a known fault each: what is written here is what must be found."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from swifti2v.data import validation
from swifti2v.data.manifest import ManifestEntry
from swifti2v.data.report import Report, check_report_path
from swifti2v.data.scenes import SceneThresholds, find_scenes
from swifti2v.data.validation import ValidationOptions, check_video, validate_videos
from swifti2v.errors import InvalidInputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Moving = Callable[..., NDArray[np.uint8]]

OPTIONS = ValidationOptions(min_frames=17, min_short_side_pixels=48)


def entry(path: Path) -> ManifestEntry:
    return ManifestEntry(path.name, path, "a prompt")


def checked(path: Path, **changes: Any) -> tuple[list[tuple[int, int]], list[tuple[str, str]]]:
    options = ValidationOptions(**({"min_frames": 17, "min_short_side_pixels": 48} | changes))
    verdict = check_video(entry(path), options)
    assert verdict.scenes or verdict.skipped
    assert all("\n" not in item.detail and item.detail for item in verdict.skipped)
    scenes = [(scene.first_frame, scene.num_frames) for scene in verdict.scenes]
    return scenes, [(item.name, item.reason) for item in verdict.skipped]


def test_a_good_video(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    verdict = check_video(entry(write_video(tmp_path / "a.mp4", moving(24))), OPTIONS)
    (scene,) = verdict.scenes
    assert (scene.name, scene.prompt, scene.size, scene.path) == ("a.mp4", "a prompt", (96, 64), tmp_path / "a.mp4")
    assert (scene.first_frame, scene.num_frames) == (0, 24)
    assert scene.motion > 20
    assert verdict.skipped == ()


def test_static(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    """A still picture, with the noise of a camera: noise is no motion."""
    noise = np.random.default_rng(0).normal(0, 3, (24, 128, 192, 3))
    still = moving(1, width=192, height=128).repeat(24, axis=0)
    path = write_video(tmp_path / "a.mp4", (still + noise).round().clip(0, 255).astype(np.uint8))
    assert checked(path, static_level=4.0) == ([], [("a.mp4", "static")])
    assert checked(path, static_level=0.0) == ([(0, 24)], [])


def test_a_small_thing_that_moves_is_motion(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    frames = moving(1).repeat(24, axis=0)
    for index, frame in enumerate(frames):
        frame[20:34, 4 + 3 * index : 16 + 3 * index] = 255
    assert checked(write_video(tmp_path / "a.mp4", frames)) == ([(0, 24)], [])


@pytest.mark.parametrize("at", [17, 20, 30])
def test_a_planted_cut(tmp_path: Path, write_video: Any, moving: Moving, at: int) -> None:
    frames = np.concatenate([moving(at, seed=1), moving(50 - at, seed=2)])
    path = write_video(tmp_path / "a.mp4", frames)
    assert checked(path) == ([(0, at), (at, 50 - at)], [])
    assert checked(path, cuts="skip") == ([], [("a.mp4", "scene cut")])
    assert checked(path, cuts="ignore") == ([(0, 50)], [])


def test_pieces_between_cuts_are_judged_one_by_one(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    pieces = [moving(20, seed=1), moving(5, seed=2), moving(1, seed=3).repeat(20, axis=0), moving(18, seed=4)]
    scenes, skipped = checked(write_video(tmp_path / "a.mp4", np.concatenate(pieces)))
    assert scenes == [(0, 20), (45, 18)]
    assert skipped == [("a.mp4[20:25]", "too short"), ("a.mp4[25:45]", "static")]


def test_cuts_are_counted_at_the_rate_of_training(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    """Frame 45 of 30 a second is 1.5 s: frame 24 of 16 a second."""
    frames = np.concatenate([moving(45, seed=1), moving(45, seed=2)])
    assert checked(write_video(tmp_path / "a.mp4", frames, fps=30)) == ([(0, 24), (24, 24)], [])


@pytest.mark.parametrize("change", ["pan", "flicker", "fade"])
def test_what_is_no_cut(moving: Moving, change: str) -> None:
    if change == "pan":
        frames = moving(30, step=12)
    elif change == "flicker":
        frames = np.stack([frame // (1 + index % 2) for index, frame in enumerate(moving(30))])
    else:
        frames = np.stack([(frame * (1 - index / 30)).astype(np.uint8) for index, frame in enumerate(moving(30))])
    assert [(span.first_frame, span.num_frames) for span in find_scenes(frames, SceneThresholds())] == [(0, 30)]


@pytest.mark.parametrize("lengths", [[1], [2], [3], [4, 1], [5, 2], [9, 3, 9], [6, 4, 1]])
def test_spans_cover_every_frame_once(moving: Moving, lengths: list[int]) -> None:
    pictures = [moving(length, seed=10 + place) for place, length in enumerate(lengths)]
    spans = list(find_scenes(np.concatenate(pictures), SceneThresholds()))
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    assert [(span.first_frame, span.num_frames) for span in spans] == list(zip(starts, lengths, strict=True))


def test_no_frames_no_spans() -> None:
    assert list(find_scenes([], SceneThresholds())) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_frames": 25}, "too short"),
        ({"min_short_side_pixels": 65}, "too small"),
        ({"fps": 24.0}, "low frame rate"),
        ({"min_source_fps": 16.5}, "low frame rate"),
    ],
)
def test_limits(tmp_path: Path, write_video: Any, moving: Moving, changes: dict[str, Any], reason: str) -> None:
    path = write_video(tmp_path / "a.mp4", moving(24))
    assert checked(path) == ([(0, 24)], [])
    assert checked(path, **changes) == ([], [("a.mp4", reason)])


def test_files_that_are_no_whole_videos(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    good = write_video(tmp_path / "good.mp4", moving(60, step=3)).read_bytes()
    faults = {
        "empty.mp4": b"",
        "text.mp4": b"this is not a video\n" * 50,
        "header.mp4": good[: len(good) // 8],
        "truncated.mp4": good[: 7 * len(good) // 10],
        "holes.mp4": b"".join(b"\0" * 64 if 3000 < at < len(good) - 64 and at % 256 == 0 else good[at : at + 64]
                              for at in range(0, len(good), 64)),
    }  # fmt: skip
    for name, content in faults.items():
        (tmp_path / name).write_bytes(content)
        scenes, ((named, reason),) = checked(tmp_path / name)
        assert (scenes, named) == ([], name)
        assert reason in ("unreadable", "damaged"), name
    assert checked(tmp_path / "truncated.mp4")[1] == [("truncated.mp4", "damaged")]
    assert checked(tmp_path / "empty.mp4")[1] == [("empty.mp4", "unreadable")]


@pytest.mark.parametrize("moment", ["opening", "reading"])
def test_whatever_a_decoder_raises_costs_one_file(
    tmp_path: Path, write_video: Any, moving: Moving, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real = validation.VideoReader

    class Failing(real):  # type: ignore[misc,valid-type]
        def __init__(self, path: Path, **options: Any) -> None:
            if moment == "opening" and path.name == "b.mp4":
                raise RuntimeError("of a kind\nthat nobody expects")
            super().__init__(path, **options)

        def frames(self) -> Iterator[Any]:
            for index, frame in enumerate(super().frames()):
                if index == 9 and self.path.name == "b.mp4":
                    raise KeyError("lost")
                yield frame

    monkeypatch.setattr(validation, "VideoReader", Failing)
    paths = [write_video(tmp_path / f"{name}.mp4", moving(20, seed=ord(name))) for name in "abc"]
    report = validate_videos([entry(path) for path in paths], OPTIONS)
    assert [scene.name for scene in report.scenes] == ["a.mp4", "c.mp4"]
    assert [(item.name, item.reason) for item in report.skipped] == [
        ("b.mp4", "unreadable" if moment == "opening" else "damaged")
    ]


@pytest.fixture
def mixed(tmp_path: Path, write_video: Any, moving: Moving) -> list[ManifestEntry]:
    paths = [
        write_video(tmp_path / "a.mp4", moving(20, seed=1)),
        Path(shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")),
        write_video(tmp_path / "c.mp4", np.concatenate([moving(18, seed=2), moving(19, seed=3)])),
        write_video(tmp_path / "d.mp4", moving(4)),
        tmp_path / "gone.mp4",
    ]
    return [entry(path) for path in paths]


def test_the_report(tmp_path: Path, mixed: list[ManifestEntry]) -> None:
    seen: list[tuple[int, int]] = []
    report = validate_videos(mixed, OPTIONS, on_video=lambda *progress: seen.append(progress))
    assert seen == [(done, 5) for done in range(1, 6)]
    assert report.counts == {"copy of another": 1, "too short": 1, "unreadable": 1}
    assert (report.num_videos, len(report.scenes), report.num_seconds) == (2, 3, 57 / 16)
    report.write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["skipped_by_reason"] == report.counts
    assert [(item["name"], item["first_frame"], item["num_frames"]) for item in content["scenes"]] == [
        ("a.mp4", 0, 20), ("c.mp4", 0, 18), ("c.mp4", 18, 19),
    ]  # fmt: skip
    assert content["skipped"][0] == {"name": "b.mp4", "reason": "copy of another", "detail": "has the content of a.mp4"}
    report.write(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["status"], row["reason"]) for row in rows] == [
        ("a.mp4", "accepted", ""), ("c.mp4", "accepted", ""), ("c.mp4", "accepted", ""),
        ("b.mp4", "skipped", "copy of another"), ("d.mp4", "skipped", "too short"),
        ("gone.mp4", "skipped", "unreadable"),
    ]  # fmt: skip
    assert (rows[2]["width"], rows[2]["first_frame"], rows[2]["num_frames"]) == ("96", "18", "19")


def test_threads_change_nothing(mixed: list[ManifestEntry]) -> None:
    assert validate_videos(mixed, OPTIONS, num_threads=3) == validate_videos(mixed, OPTIONS, num_threads=0)


def test_copies_may_be_kept(mixed: list[ManifestEntry]) -> None:
    report = validate_videos(mixed[:2], ValidationOptions(min_frames=17, min_short_side_pixels=48, find_copies=False))
    assert [scene.name for scene in report.scenes] == ["a.mp4", "b.mp4"]


def test_reports_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.json or \.csv"):
        check_report_path(tmp_path / "report.txt")
    with pytest.raises(OutputError, match="is no folder"):
        Report(16.0, (), ()).write(tmp_path / "gone" / "report.json")


@pytest.mark.parametrize("options", [{"fps": 0.0}, {"min_frames": 0}, {"cuts": "drop"}])
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        ValidationOptions(**options)
    with pytest.raises(InvalidInputError):
        SceneThresholds(cut_ratio=0)


def test_finding_scenes_keeps_no_frames(moving: Moving) -> None:
    """A frame of 96x64 takes 18 kB: four times the length may cost no more than five of them."""

    def peak_bytes(num_rounds: int) -> int:
        loop = list(moving(24, step=3))
        tracemalloc.start()
        spans = list(find_scenes(chain.from_iterable(repeat(loop, num_rounds)), SceneThresholds(cut_ratio=1e9)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [span.num_frames for span in spans] == [24 * num_rounds]
        return peak

    peak_bytes(1)  # what is imported and set up at the first call is not to be counted
    assert peak_bytes(4) < peak_bytes(1) + 5 * 96 * 64 * 3


def test_a_long_video_is_never_held_as_a_whole(tmp_path: Path, write_video: Any, moving: Moving) -> None:
    path = write_video(tmp_path / "long.mp4", np.concatenate([moving(40, step=2)] * 4))
    options = ValidationOptions(min_short_side_pixels=48, cuts="ignore")
    check_video(entry(path), options)  # what is imported and set up at the first call is not to be counted
    tracemalloc.start()
    verdict = check_video(entry(path), options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.scenes[0].num_frames == 160
    assert peak < 40 * 96 * 64 * 3
