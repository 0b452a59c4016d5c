"""The table of an evaluation: its cells for the terminal and the page, and as a Markdown document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.evaluation.results import Better, Evaluation, Metric, VideoResult

DASH = "\N{EN DASH}"
BETTER = {
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
    "one": ("\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}1", "best is 1"),
    "zero": ("\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}0", "best is 0"),
    "neither": ("", "neither high nor low is good: read it beside the others"),
}
"""Sign and words for each value of `Metric.better`."""

_DIGITS = 4


class Cell(NamedTuple):
    """A number of the table: as it is shown, and whether none of the ranked videos has a better one."""

    text: str
    best: bool


def heading(metric: Metric) -> str:
    """Return the label of a metric with the sign that says which values are good."""
    return f"{metric.label} {BETTER[metric.better][0]}".strip()


def table_row(metric: Metric, videos: Sequence[VideoResult]) -> list[Cell]:
    """Return the cells of a metric, one per video.

    The best are marked among videos that have a file (a control in memory, like a still image, wins what it cannot
    lose) if at least two of them have a number; equal ones are all marked.
    """
    values = [float(video.values.get(metric.name, math.nan)) for video in videos]
    texts = number_texts(values)
    ranked = [i for i, video in enumerate(videos) if video.path is not None and not math.isnan(values[i])]
    best = None
    if len(ranked) > 1 and metric.better != "neither":
        best = texts[min(ranked, key=lambda i: _badness(values[i], metric.better))]
    return [Cell(text, i in ranked and text == best) for i, text in enumerate(texts)]


def number_texts(values: Sequence[float]) -> list[str]:
    """Return numbers of one row with the same decimals: four digits of the largest; a dash for NaN."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = 0 if largest == 0 else min(max(_DIGITS - 1 - math.floor(math.log10(largest)), 0), 6)

    def text(value: float) -> str:
        if math.isnan(value):
            return DASH
        shown = f"{value:.2e}" if 0 < largest < 10 ** (1 - _DIGITS) else f"{value:.{decimals}f}"
        return shown.replace("inf", "\N{INFINITY}").replace("-", "\N{MINUS SIGN}")

    return [text(value) for value in values]


def setting_text(value: Any) -> str:
    """Return a setting as people read it: nested ones as JSON, yes and no for booleans."""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def markdown(evaluation: Evaluation) -> str:
    """Return a page: a row per metric and a column per video, the best number of a row in bold, and what it means."""
    videos, metrics = evaluation.videos, evaluation.metrics
    named = (("Image", evaluation.image), ("Truth", evaluation.truth))
    rows = [
        ["", *(_plain(video.label) for video in videos)],
        ["---", *("---:" for _ in videos)],
        ["frames", *(str(video.num_frames) for video in videos)],
        ["size", *(f"{video.width}x{video.height}" for video in videos)],
    ]
    for metric in metrics:
        cells = table_row(metric, videos)
        rows.append([_plain(heading(metric)), *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)])
    lists = {
        "Notes": [f"{_plain(video.label)}: {_plain(note)}" for video in videos for note in video.notes],
        "What the numbers mean": [
            f"**{_plain(metric.label)}**: {_plain(metric.meaning)}; {BETTER[metric.better][1]}." for metric in metrics
        ],
        "Settings": [f"{name}: {_plain(setting_text(value))}" for name, value in evaluation.settings.items()],
    }
    blocks = ["# Evaluation", "  \n".join(f"{name}: {_plain(path)}" for name, path in named if path)]
    blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    for title, lines in lists.items():
        blocks += [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _badness(value: float, better: Better) -> float:
    return {"higher": -value, "lower": value, "one": abs(value - 1), "zero": abs(value)}[better]


def _plain(text: str) -> str:
    """Escape what would end a cell or start markup: names of files may hold anything."""
    for sign in "\\`*_|<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
