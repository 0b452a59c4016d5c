"""Plots of a report: each metric over time, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from swifti2v.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from swifti2v.evaluation.results import Curve, Evaluation, Metric

NUM_COLOURS = 6
"""Colours of lines, ``--series-1`` to ``--series-6`` in the page's style sheet."""

_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_WIDTH_INCHES, _HEIGHT_INCHES = 6.2, 3.3
_FONT_POINTS = 12
_CHARACTER_POINTS = 7.2  # mean width of a character at that size, rounded up: labels are drawn by the browser's font
_LINE_POINTS = 15
_LONGEST_LABEL = 22  # characters
_LEFT, _BOTTOM = 0.115, 0.18  # of the width and height: room for numbers
# Stand-ins that matplotlib draws with and that are replaced by the page's colours.
_INK, _FAINT = "#010203", "#040506"
_SERIES = tuple(f"#0708{number:02x}" for number in range(NUM_COLOURS))


@dataclass(frozen=True)
class Plot:
    """A plot ready for a page.

    Args:
        metric: name of the metric.
        svg: an ``<svg>`` element without references to anything outside of it.
        alt: the lines in words: mean, lowest and highest value of each video.
    """

    metric: str
    svg: str
    alt: str


def make_plots(evaluation: Evaluation) -> tuple[Plot, ...]:
    """Return a plot for each metric that has a curve with a number in it, in the order of the metrics.

    Raises:
        OutputError: matplotlib is not installed.
    """
    known = [metric.name for metric in evaluation.metrics]
    others = {curve.metric for video in evaluation.videos for curve in video.curves} - set(known)
    return tuple(plot for name in (*known, *sorted(others)) for plot in _plot(evaluation, name))


def series_number(index: int) -> int:
    """Return the number of the colour, 1 .. `NUM_COLOURS`, of the video at place `index`."""
    return index % NUM_COLOURS + 1


def spread_labels(heights: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return heights near the given ones that are `distance` apart and inside ``low .. high`` if all fit there.

    The order is kept, of equal heights too.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    floor = low
    for index in order:
        placed[index] = max(heights[index], floor)
        floor = placed[index] + distance
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - distance
    return placed


def _plot(evaluation: Evaluation, name: str) -> Iterator[Plot]:
    curves = [
        (index, video.label, curve)
        for index, video in enumerate(evaluation.videos)
        for curve in video.curves
        if curve.metric == name and any(math.isfinite(value) for value in curve.values)
    ]
    if not curves:
        return
    metric = next((each for each in evaluation.metrics if each.name == name), None)
    sentences = [f"{label}: {_in_words(curve)}" for _, label, curve in curves]
    title = name if metric is None else metric.label
    yield Plot(name, _draw(name, curves, metric), f"{title} over time. " + "; ".join(sentences))


def _in_words(curve: Curve) -> str:
    values = [value for value in curve.values if math.isfinite(value)]
    mean = math.fsum(values) / len(values)
    return f"mean {mean:.4g}, from {min(values):.4g} to {max(values):.4g}"


def _draw(name: str, curves: Sequence[tuple[int, str, Curve]], metric: Metric | None) -> str:
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "a report needs matplotlib, which is not installed; run: pip install 'swifti2v[evaluate]'"
        raise OutputError(msg) from error
    # The user's own style would change sizes that the layout counts on. The salt keeps names unique in the page.
    with style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name}]):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES))
        longest = min(_LONGEST_LABEL, max(len(label) for _, label, _ in curves))
        right = 1 - (_CHARACTER_POINTS * longest + 14) / (_WIDTH_INCHES * 72)
        axes = figure.add_axes((_LEFT, _BOTTOM, right - _LEFT, 0.97 - _BOTTOM))
        _prepare(axes)
        ends = [_draw_curve(axes, index, label, curve) for index, label, curve in curves]
        _show_best(axes, metric)
        _label_ends(axes, ends)
        return _page_svg(figure)


def _prepare(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.tick_params(colors=_INK, labelsize=_FONT_POINTS, length=0)
    axes.set_xlabel("frame", color=_INK, fontsize=_FONT_POINTS)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(nbins=5)
    axes.ticklabel_format(useOffset=False)
    axes.margins(x=0.01, y=0.08)


def _draw_curve(axes: Any, index: int, label: str, curve: Curve) -> tuple[str, str, float]:
    """Draw a line, with dots where a value has no neighbours; return its label, colour and last value."""
    frames, values = np.asarray(curve.frames), np.asarray(curve.values, dtype=float)
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    colour, dashes = _SERIES[index % NUM_COLOURS], _DASHES[index % len(_DASHES)]
    axes.plot(frames, values, color=colour, linestyle=dashes, linewidth=1.9)
    alone = finite & ~_neighbour(finite, 1) & ~_neighbour(finite, -1)
    axes.plot(frames[alone], values[alone], color=colour, linestyle="none", marker="o", markersize=4)
    return label, colour, float(values[np.flatnonzero(finite)[-1]])


def _neighbour(finite: Any, step: int) -> Any:
    moved = np.roll(finite, step)
    moved[0 if step > 0 else -1] = False
    return moved


def _show_best(axes: Any, metric: Metric | None) -> None:
    """Draw the value that is best, where it is one number and near what is shown."""
    best = {"one": 1.0, "zero": 0.0}.get("" if metric is None else metric.better)
    low, high = axes.get_ylim()
    if best is not None and low - 0.25 * (high - low) <= best <= high + 0.25 * (high - low):
        axes.axhline(best, color=_INK, linewidth=0.9)


def _label_ends(axes: Any, ends: Sequence[tuple[str, str, float]]) -> None:
    """Write each label beside the end of its line, moved apart where lines end together."""
    low, high = axes.get_ylim()
    points = axes.get_position().height * _HEIGHT_INCHES * 72
    heights = [(value - low) / (high - low) * points for _, _, value in ends]
    for (label, colour, _), height in zip(ends, spread_labels(heights, _LINE_POINTS, 0, points), strict=True):
        axes.text(
            1.015,
            height / points,
            _shortened(label),
            color=colour,
            fontsize=_FONT_POINTS,
            fontweight="bold",
            transform=axes.transAxes,
            verticalalignment="center",
            parse_math=False,
        )


def _shortened(label: str) -> str:
    """Leave out the middle of a long label: names of files differ at their ends."""
    half = (_LONGEST_LABEL - 1) // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[-half:]}"


def _page_svg(figure: Any) -> str:
    """Return the figure as an ``<svg>`` element for a page: its colours and font, no addresses, no names of parts."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    inside = re.split(r"<svg\b[^>]*>", drawn.getvalue(), maxsplit=1)[1]
    svg = f'<svg viewBox="0 0 {_WIDTH_INCHES * 72:g} {_HEIGHT_INCHES * 72:g}" aria-hidden="true">{inside}'
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[^"]*"', "<g", svg)
    svg = re.sub(r"'?DejaVu Sans'?(, [^;\"]*)?", "inherit", svg)
    colours = {_INK: "var(--ink)", _FAINT: "var(--rule)"}
    colours |= {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)}
    for stand_in, colour in colours.items():
        svg = svg.replace(stand_in, colour)
    return svg.strip()
