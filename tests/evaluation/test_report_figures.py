"""The pictures of a report: curves as files that a browser draws, crops where and when videos differ."""

from __future__ import annotations

import base64
import math
import weakref
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.evaluation.report_figures import (
    IMAGE_LABEL,
    Picture,
    encode_picture,
    largest_difference,
    make_crops,
    make_plots,
)
from swifti2v.evaluation.results import Curve, Evaluation, Metric, VideoResult
from swifti2v.evaluation.sources import FrameSource
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Generator

NAN = math.nan
HEIGHT, WIDTH, FRAMES = 96, 160, 13


def metric(name: str) -> Metric:
    return Metric(name, f"Label of {name}", "one", "a formula")


def video(label: str, **curves: list[float]) -> VideoResult:
    drawn = tuple(Curve(name, tuple(range(len(values))), tuple(values)) for name, values in curves.items())
    return VideoResult(label, None, 64, 64, 9, 8.0, {}, drawn)


def content(picture: Picture) -> bytes:
    return base64.b64decode(picture.uri.partition(",")[2])


def pixels(picture: Picture) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(content(picture), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def gray(level: float, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((height, width, 3), round(level), np.uint8)


def ramp(frames: int = FRAMES) -> list[np.ndarray]:
    """Frame t is flat gray of level 40 + 10 t."""
    return [gray(40 + 10 * t) for t in range(frames)]


def source(label: str, frames: list[np.ndarray]) -> FrameSource:
    def generate() -> Generator[np.ndarray]:
        yield from frames

    size = Size(frames[0].shape[1], frames[0].shape[0])
    return FrameSource(label, size, 8.0, generate, path=f"{label}.mp4", num_frames=len(frames))


def test_one_plot_per_metric_in_the_order_of_metrics() -> None:
    videos = (video("a", second=[1.0], first=[1.0, 3.0], empty=[NAN]), video("<$x^2$", first=[0.5, NAN, 0.5, math.inf]))
    plots = make_plots(Evaluation(videos, tuple(map(metric, ("first", "absent", "empty", "second")))))
    assert [plot.label for plot in plots] == ["Label of first", "Label of second"]
    assert plots[0].alt == "Label of first over time. a: mean 2, from 1 to 3; <$x^2$: mean 0.5, from 0.5 to 0.5"
    for plot in plots:
        assert plot.uri.startswith("data:image/svg+xml;base64,")
        assert ET.fromstring(content(plot)).tag.endswith("svg")  # noqa: S314 - of our own text
    again = make_plots(Evaluation(videos, (metric("first"),)))
    assert again[0] == plots[0], "the same numbers give the same file"


def test_crops_stand_where_and_when_the_first_two_videos_differ() -> None:
    first, second = ramp(), [frame.copy() for frame in ramp()]
    planted = {0: (8, 8), 3: (100, 50), 6: (40, 20), 11: (120, 4)}  # frame: left, top
    for frame, (left, top) in planted.items():
        second[frame][top : top + 24, left : left + 24] = 255
    rows = make_crops([source("a", first), source("b", second)], None)
    assert [row.frame for row in rows] == list(planted)
    for row, (left, top) in zip(rows, planted.values(), strict=True):
        assert row.compared == ("a", "b")
        assert left + 22 - row.side <= row.left <= left + 2
        assert top + 22 - row.side <= row.top <= top + 2
        a, b = map(pixels, row.pictures)
        assert a.shape == b.shape == (row.side, row.side, 3)
        assert b.max() == 255 > a.max()
        assert row.difference == pytest.approx(np.abs(a.astype(float) - b).mean(), rel=0.1)


def test_crops_do_not_all_show_one_defect() -> None:
    """A strong defect that stays, and weaker ones elsewhere: the strong one is shown once."""
    second = [frame.copy() for frame in ramp()]
    for frame in second:
        frame[4:28, 4:28] = 255
        frame[60:84, 60:84] += 30
        frame[4:28, 120:144] += 40
    rows = make_crops([source("a", ramp()), source("b", second)], None)
    assert len(rows) == 4
    assert [row.left < 28 and row.top < 28 for row in rows[:3]] == [True, False, False]
    assert rows[1].left > 90 > rows[2].left > 30


def test_videos_of_other_length_and_size_stand_side_by_side_and_frame_zero_shows_the_image() -> None:
    """The rival is larger; the truth, which is shorter, is compared with one video alone."""
    large = [gray(40 + 10 * t, height=2 * HEIGHT, width=2 * WIDTH) for t in range(FRAMES)]
    large[9][100:180, 100:180] = 255
    rows = make_crops([source("a", ramp()), source("b", large), source("truth", ramp(5))], gray(200))
    assert [each.label for each in rows[0].pictures] == ["a", "b", "truth", IMAGE_LABEL]
    assert pixels(rows[0].pictures[-1]).mean() == 200
    assert 9 in [row.frame for row in rows]
    assert [each.label for each in rows[-1].pictures] == ["a", "b"]
    assert len({pixels(each).shape for row in rows for each in row.pictures}) == 1


def test_one_video_alone_is_compared_with_its_image_only() -> None:
    (row,) = make_crops([source("a", ramp())], gray(0))
    assert (row.frame, row.compared) == (0, ("a", IMAGE_LABEL))
    assert make_crops([source("a", ramp())], None) == make_crops([], None) == ()


def test_few_frames_are_held() -> None:
    alive: list[int] = []

    def generate() -> Generator[np.ndarray]:
        frames = []
        for shown in map(gray, range(48)):
            frames.append(weakref.ref(shown))
            alive.append(sum(reference() is not None for reference in frames))
            yield shown

    each = FrameSource("a", Size(WIDTH, HEIGHT), 8.0, generate, num_frames=48)
    make_crops([each, source("b", [gray(0)] * 48)], None)
    assert max(alive) < 8


@pytest.mark.parametrize(("left", "top"), [(0, 0), (1000, 0), (517, 301), (1200, 640)])
def test_the_largest_difference_is_found_also_on_a_reduced_map(left: int, top: int) -> None:
    first = gray(100, height=704, width=1280)
    second = first.copy()
    second[top : top + 64, left : left + 64] = 160
    difference, found_left, found_top = largest_difference(first, second, side=64)
    assert (found_left, found_top) == (pytest.approx(left, abs=8), pytest.approx(top, abs=8))
    assert difference == pytest.approx(60, rel=0.15)
    assert 0 <= found_left <= 1280 - 64
    assert 0 <= found_top <= 704 - 64


def test_places_that_were_shown_are_left_to_others() -> None:
    first = gray(100)
    second = first.copy()
    second[10:42, 10:42] = 200
    second[50:82, 100:132] = 150
    assert largest_difference(first, second, side=32)[1:] == (10, 10)
    assert largest_difference(first, second, side=32, taken=[(10, 10)])[1:] == (100, 50)
    whole = largest_difference(first, second, side=HEIGHT, taken=[(0, 0), (WIDTH - HEIGHT, 0), (32, 0)])
    assert whole[0] > 0, "where nothing else remains, a place may be shown twice"


def test_pictures_keep_every_level() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert np.array_equal(pixels(encode_picture(frame, "a", "noise")), frame)
