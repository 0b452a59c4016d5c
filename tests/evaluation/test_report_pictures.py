from __future__ import annotations

import base64
import tracemalloc
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.report_pictures import (
    Picture,
    encode_picture,
    largest_difference,
    make_pictures,
    sheet_frames,
    video_sources,
)
from swifti2v.evaluation.results import Evaluation, VideoResult
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from pathlib import Path

HEIGHT, WIDTH, FRAMES = 96, 160, 13


def grey(level: float, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((height, width, 3), round(level), np.uint8)


def ramp(frames: int = FRAMES) -> list[np.ndarray]:
    """Frame t is flat grey of level 40 + 10 t."""
    return [grey(40 + 10 * t) for t in range(frames)]


def write(path: Path, frames: list[np.ndarray], fps: float = 8) -> str:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, size=Size(width, height), fps=fps, crf=4, preset="ultrafast", num_threads=1) as writer:
        writer.write(np.stack(frames))
    return str(path)


def result(
    label: str, path: str | None, *, size: tuple[int, int] = (WIDTH, HEIGHT), frames: int = FRAMES
) -> VideoResult:
    return VideoResult(label, path, *size, frames, 8.0, {})


def pixels(picture: Picture) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(picture.uri.partition(",")[2]), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_contact_sheet_shows_the_frames_that_it_names(tmp_path: Path) -> None:
    video = result("a", write(tmp_path / "a.mp4", ramp()))
    (shown,) = make_pictures(Evaluation((video,), ())).videos
    assert [each.label for each in shown.sheet] == [f"frame {index}" for index in (0, 2, 5, 7, 10, 12)]
    levels = [pixels(each).mean() for each in shown.sheet]
    assert levels == pytest.approx([40, 60, 90, 110, 140, 160], abs=3)
    assert all(each.alt.startswith("a, frame ") for each in shown.sheet)


@pytest.mark.parametrize(("num_frames", "expected"), [(1, (0,)), (3, (0, 1, 2)), (81, (0, 16, 32, 48, 64, 80))])
def test_sheet_frames_run_from_the_first_to_the_last(num_frames: int, expected: tuple[int, ...]) -> None:
    assert sheet_frames(num_frames) == expected


def test_a_jump_stands_in_its_row_of_the_slice_and_a_column_stays_one(tmp_path: Path) -> None:
    """Time runs downwards: the planted jump of brightness is between the rows of frames 7 and 8."""
    frames = [grey(60 if t < 8 else 120) for t in range(FRAMES)]
    for frame in frames:
        frame[:, 40:48] = 230
    video = result("a", write(tmp_path / "a.mp4", frames))
    (shown,) = make_pictures(Evaluation((video,), ())).videos
    seen = pixels(shown.time_slice)
    assert seen.shape[1] == WIDTH
    assert seen.shape[0] % FRAMES == 0
    rows = seen[:: seen.shape[0] // FRAMES].astype(float).mean(axis=-1)
    assert rows[:8, 80:].mean() == pytest.approx(60, abs=4)
    assert rows[8:, 80:].mean() == pytest.approx(120, abs=4)
    assert rows[:, 42:46].min() > 210


def test_slices_of_all_videos_show_the_same_height(tmp_path: Path) -> None:
    """The detail lies at three quarters of the height of the first video; the second is half as large."""
    large, small = grey(50), grey(50, height=HEIGHT // 2, width=WIDTH // 2)
    large[70:76, ::8] = 250
    small[33:40] = 200
    videos = (
        result("a", write(tmp_path / "a.mp4", [large] * 4), frames=4),
        result("b", write(tmp_path / "b.mp4", [small] * 4), size=(WIDTH // 2, HEIGHT // 2), frames=4),
    )
    shown = make_pictures(Evaluation(videos, ()))
    assert shown.slice_height == pytest.approx(73 / HEIGHT, abs=0.04)
    assert pixels(shown.videos[1].time_slice).mean() == pytest.approx(200, abs=6)


def test_crops_stand_where_and_when_the_first_two_videos_differ(tmp_path: Path) -> None:
    first, second = ramp(), [frame.copy() for frame in ramp()]
    planted = {0: (8, 8), 3: (100, 50), 6: (40, 20), 11: (120, 4)}  # frame: left, top
    for frame, (left, top) in planted.items():
        second[frame][top : top + 24, left : left + 24] = 255
    videos = (result("a", write(tmp_path / "a.mp4", first)), result("b", write(tmp_path / "b.mp4", second)))
    rows = make_pictures(Evaluation(videos, ())).crops
    assert [row.frame for row in rows] == list(planted)
    for row, (left, top) in zip(rows, planted.values(), strict=True):
        assert row.compared == ("a", "b")
        assert row.left <= left + 2
        assert row.top <= top + 2
        assert row.left + row.side >= left + 22
        assert row.top + row.side >= top + 22
        a, b = map(pixels, row.pictures)
        assert a.shape == b.shape == (row.side, row.side, 3)
        assert b.max() > 240 > a.max()
        assert row.difference == pytest.approx(np.abs(a.astype(float) - b).mean(), rel=0.1)


def test_crops_do_not_all_show_one_defect(tmp_path: Path) -> None:
    """A strong defect that stays, and weaker ones elsewhere: the strong one is shown once."""
    second = [frame.copy() for frame in ramp()]
    for frame in second:
        frame[4:28, 4:28] = 255
        frame[60:84, 60:84] += 30
        frame[4:28, 120:144] += 40
    videos = (result("a", write(tmp_path / "a.mp4", ramp())), result("b", write(tmp_path / "b.mp4", second)))
    rows = make_pictures(Evaluation(videos, ())).crops
    assert len(rows) == 4
    assert [row.left < 28 and row.top < 28 for row in rows[:3]] == [True, False, False]
    assert rows[1].left > 90 > rows[2].left > 30


def test_one_video_is_compared_with_the_truth_and_frame_zero_shows_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 30)).save(tmp_path / "image.png")
    truth = ramp()
    truth[5][60:90, 90:120] = 255
    evaluation = Evaluation(
        (result("a", write(tmp_path / "a.mp4", ramp())),),
        (),
        image=str(tmp_path / "image.png"),
        truth=write(tmp_path / "truth.mp4", truth),
    )
    shown = make_pictures(evaluation)
    assert [each.label for each in shown.crops[0].pictures] == ["a", "truth", "input image"]
    assert pixels(shown.crops[0].pictures[-1]).mean(axis=(0, 1)) == pytest.approx([200, 30, 30], abs=1)
    assert 5 in [row.frame for row in shown.crops]
    assert [each.label for each in shown.videos] == ["a", "truth"]
    assert shown.image is not None
    assert (shown.image.width, shown.image.height) == (WIDTH, HEIGHT)


def test_one_video_alone_is_compared_with_its_image_only(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), (40, 40, 40)).save(tmp_path / "image.png")
    video = result("a", write(tmp_path / "a.mp4", ramp()))
    (row,) = make_pictures(Evaluation((video,), (), image=str(tmp_path / "image.png"))).crops
    assert (row.frame, row.compared) == (0, ("a", "input image"))
    assert make_pictures(Evaluation((video,), ())).crops == ()


def test_videos_of_other_length_size_and_rate_stand_side_by_side(tmp_path: Path) -> None:
    """The second is larger, has twice the rate and was judged at the first's form; the truth is shorter."""
    fast = [grey(40 + 5 * t, height=2 * HEIGHT, width=2 * WIDTH + 32) for t in range(2 * FRAMES)]
    evaluation = Evaluation(
        (
            result("a", write(tmp_path / "a.mp4", ramp())),
            result("b", write(tmp_path / "b.mp4", fast, fps=16)),
        ),
        (),
        truth=write(tmp_path / "truth.mp4", ramp(5)),
    )
    a, b, truth = make_pictures(evaluation).videos
    for one, other in zip(a.sheet, b.sheet, strict=True):
        assert (one.width, one.height) == (other.width, other.height)
        assert pixels(one).mean() == pytest.approx(pixels(other).mean(), abs=6)
    assert [each.label for each in truth.sheet] == ["frame 0", "frame 2"]


def test_each_video_is_read_once_and_few_frames_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_frames, height, width = 48, 192, 320
    frames = [grey(4 * t, height=height, width=width) for t in range(num_frames)]
    paths = [write(tmp_path / f"{name}.mp4", frames) for name in "ab"]
    del frames
    read: list[Path] = []
    original = VideoReader.frames

    def counted(self: VideoReader) -> Any:
        read.append(self.path)
        return original(self)

    monkeypatch.setattr(VideoReader, "frames", counted)
    videos = tuple(result(path[-5], path, size=(width, height), frames=num_frames) for path in paths)
    tracemalloc.start()
    try:
        make_pictures(Evaluation(videos, ()))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(map(str, read)) == paths
    assert peak_bytes < 20 * height * width * 3, "all frames of both would be 96"


def test_controls_without_a_file_are_left_out_and_the_truth_is_not_shown_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", ramp(2))
    evaluation = Evaluation((result("still image", None), result("a", path, frames=2)), (), truth=path)
    assert [source.label for source in video_sources(evaluation)] == ["a"]
    assert make_pictures(Evaluation((result("still image", None),), ())).videos == ()


def test_a_missing_video_is_an_error_that_names_it(tmp_path: Path) -> None:
    video = result("a", str(tmp_path / "gone.mp4"))
    with pytest.raises(VideoInputError, match=r"gone\.mp4"):
        make_pictures(Evaluation((video,), ()))


@pytest.mark.parametrize(("left", "top"), [(0, 0), (1000, 0), (517, 301), (1200, 640)])
def test_the_largest_difference_is_found_also_on_a_reduced_map(left: int, top: int) -> None:
    first = grey(100, height=704, width=1280)
    second = first.copy()
    second[top : top + 64, left : left + 64] = 160
    difference, found_left, found_top = largest_difference(first, second, side=64)
    assert (found_left, found_top) == (pytest.approx(left, abs=8), pytest.approx(top, abs=8))
    assert difference == pytest.approx(60, rel=0.15)
    assert 0 <= found_left <= 1280 - 64
    assert 0 <= found_top <= 704 - 64


def test_places_that_were_shown_are_left_to_others() -> None:
    first = grey(100)
    second = first.copy()
    second[10:42, 10:42] = 200
    second[50:82, 100:132] = 150
    assert largest_difference(first, second, side=32)[1:] == (10, 10)
    assert largest_difference(first, second, side=32, taken=[(10, 10)])[1:] == (100, 50)
    whole = largest_difference(first, second, side=HEIGHT, taken=[(0, 0), (WIDTH - HEIGHT, 0), (32, 0)])
    assert whole[0] > 0, "where nothing else remains, a place may be shown twice"


def test_pictures_keep_their_colours_and_pngs_every_level() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert np.array_equal(pixels(encode_picture(frame, "a", "noise", lossless=True)), frame)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    jpeg = encode_picture(red, "a", "red", lossless=False)
    assert jpeg.uri.startswith("data:image/jpeg;base64,")
    assert pixels(jpeg).mean(axis=(0, 1)) == pytest.approx([200, 0, 0], abs=4)
