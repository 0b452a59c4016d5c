from __future__ import annotations

import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import OutputError
from swifti2v.evaluation.report_figures import NUM_COLOURS, Plot, make_plots, series_number, spread_labels
from swifti2v.evaluation.results import Better, Curve, Evaluation, Metric, VideoResult

NAN = math.nan
NAMESPACE = 'xmlns:xlink="x"'


def metric(name: str, better: Better = "higher") -> Metric:
    return Metric(name, f"Label of {name}", better, "0 .. 1", "a formula", "a paper")


def video(label: str, **curves: list[float]) -> VideoResult:
    drawn = tuple(Curve(name, tuple(range(len(values))), tuple(values)) for name, values in curves.items())
    return VideoResult(label, None, 64, 64, 9, 8.0, {}, drawn)


def plot(*videos: VideoResult, better: Better = "higher") -> Plot:
    (only,) = make_plots(Evaluation(videos, (metric("m", better),)))
    return only


def elements(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg", f"<svg {NAMESPACE}", 1))  # noqa: S314 - of our own text


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in elements(svg).iter("text")]


def line(svg: str, series: int) -> list[tuple[float, float]]:
    """Points of the line in the colour of a series, in points from the upper left corner."""
    (path,) = [
        each for each in elements(svg).iter("path") if f"stroke: var(--series-{series})" in each.get("style", "")
    ]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d", ""))]


def test_one_plot_per_metric_in_the_order_of_metrics() -> None:
    videos = (video("a", second=[1.0], first=[1.0, 2.0]), video("b", unknown=[3.0, 4.0]))
    plots = make_plots(Evaluation(videos, (metric("first"), metric("absent"), metric("second"))))
    assert [each.metric for each in plots] == ["first", "second", "unknown"]


def test_lines_follow_the_numbers() -> None:
    drawn = plot(video("a", m=[0.0, 1.0, 3.0, 2.0]))
    points = line(drawn.svg, 1)
    steps = [before[0] - after[0] for before, after in itertools.pairwise(points)]
    assert steps == pytest.approx([steps[0]] * 3)
    heights = [points[0][1] - y for _, y in points]
    assert [height / heights[1] for height in heights] == pytest.approx([0, 1, 3, 2], abs=1e-3)


def test_each_video_has_its_colour_and_its_label_at_the_end_of_its_line() -> None:
    drawn = plot(video("alpha", m=[0.0, 1.0]), video("beta", m=[1.0, 0.0]))
    labels = {each.text: each for each in elements(drawn.svg).iter("text") if each.text in ("alpha", "beta")}
    for series, label in enumerate(labels, start=1):
        end = line(drawn.svg, series)[-1]
        assert f"fill: var(--series-{series})" in labels[label].get("style", "")
        assert float(labels[label].get("x", "0")) > end[0]
        assert float(labels[label].get("y", "0")) == pytest.approx(end[1], abs=8)


def test_a_number_that_is_not_defined_breaks_the_line_and_a_lone_one_is_a_dot() -> None:
    drawn = plot(video("a", m=[1.0, 2.0, NAN, 3.0, NAN, math.inf]))
    path = next(each for each in elements(drawn.svg).iter("path") if "stroke: var(--series-1)" in each.get("style", ""))
    assert path.get("d", "").count("M") == 2
    assert len(list(elements(drawn.svg).iter("use"))) == 1
    assert "mean 2, from 1 to 3" in drawn.alt


def test_the_first_number_and_the_last_are_no_neighbours() -> None:
    drawn = plot(video("a", m=[1.0, NAN, 2.0, 3.0]), video("b", m=[1.0, 2.0, NAN, 3.0]), video("c", m=[5.0]))
    assert len(list(elements(drawn.svg).iter("use"))) == 3


def test_curves_without_a_number_make_no_plot() -> None:
    assert make_plots(Evaluation((video("a", m=[NAN, NAN]), video("b")), (metric("m"),))) == ()


def test_alternative_text_tells_every_line() -> None:
    drawn = plot(video("a", m=[1.0, 3.0]), video("b", m=[0.5, 0.5]))
    assert drawn.alt == "Label of m over time. a: mean 2, from 1 to 3; b: mean 0.5, from 0.5 to 0.5"


def test_labels_are_text_and_neither_markup_nor_formulas() -> None:
    label = "<b>&$x^2$"
    assert label in texts(plot(video(label, m=[0.0, 1.0])).svg)


def test_pictures_of_the_page_only_no_addresses_and_no_name_twice() -> None:
    videos = (video("a", m=[1.0, NAN, 2.0], n=[1.0, NAN, 2.0]), video("b", m=[2.0, 3.0, 4.0], n=[2.0, 3.0, 4.0]))
    plots = make_plots(Evaluation(videos, (metric("m"), metric("n"))))
    together = "".join(each.svg for each in plots)
    assert "http" not in together
    assert "<style" not in together
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", together)), "fixed colours"
    names = re.findall(r'\bid="([^"]*)"', together)
    assert len(names) == len(set(names)) > 0
    assert {*re.findall(r"url\(#(\w+)\)", together), *re.findall(r'href="#(\w+)"', together)} <= set(names)


@pytest.mark.parametrize(("better", "values", "expected"), [
    ("one", [0.9, 1.2], 1),
    ("one", [4.0, 5.0], 0),
    ("zero", [-1.0, 1.0], 1),
    ("higher", [0.9, 1.2], 0),
])  # fmt: skip
def test_the_best_number_is_drawn_where_it_is_near(better: Better, values: list[float], expected: int) -> None:
    styles = [each.get("style", "") for each in elements(plot(video("a", m=values), better=better).svg).iter("path")]
    assert sum("stroke: var(--ink)" in style for style in styles) == expected


def test_the_same_numbers_give_the_same_text() -> None:
    videos = (video("a", m=[1.0, 2.0]), video("b", m=[2.0, 3.0]))
    assert plot(*videos) == plot(*videos)


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r"pip install 'swifti2v\[evaluate\]'"):
        plot(video("a", m=[1.0, 2.0]))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_labels_are_apart_inside_and_in_order(heights: list[float]) -> None:
    placed = spread_labels(heights, 16, 0, 100)
    in_order = sorted(placed)
    assert all(-1e-9 <= height <= 100 + 1e-9 for height in placed)
    assert all(b - a >= 16 - 1e-6 for a, b in itertools.pairwise(in_order))
    assert [placed[i] for i in sorted(range(len(heights)), key=lambda i: heights[i])] == in_order


def test_labels_that_are_apart_stay_where_they_are() -> None:
    assert spread_labels([70.0, 10.0, 40.0], 16, 0, 100) == [70.0, 10.0, 40.0]


def test_colours_repeat_only_after_all_were_used() -> None:
    assert [series_number(index) for index in range(NUM_COLOURS + 1)] == [*range(1, NUM_COLOURS + 1), 1]
