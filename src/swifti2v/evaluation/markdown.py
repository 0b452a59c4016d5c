"""An evaluation as a Markdown page: a table of every number, what each means, and what is to be known of each video."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swifti2v.evaluation.report import BETTER, setting_text, table_row

if TYPE_CHECKING:
    from swifti2v.evaluation.results import Evaluation, Metric


def markdown(evaluation: Evaluation) -> str:
    """Return the page: a row per metric and a column per video, the best number of a row in bold."""
    blocks = ["# Evaluation", *_inputs(evaluation), _table(evaluation)]
    notes = [f"- {_plain(video.label)}: {_plain(note)}" for video in evaluation.videos for note in video.notes]
    if notes:
        blocks += ["## Notes", "\n".join(notes)]
    blocks += ["## What the numbers mean", "\n".join(_meaning(metric) for metric in evaluation.metrics)]
    if evaluation.settings:
        settings = [f"- {name}: {_plain(setting_text(value))}" for name, value in evaluation.settings.items()]
        blocks += ["## Settings", "\n".join(settings)]
    return "\n\n".join(blocks) + "\n"


def heading(metric: Metric) -> str:
    """Return the label of a metric with the sign that says which values are good."""
    return f"{metric.label} {BETTER[metric.better][0]}".strip()


def _inputs(evaluation: Evaluation) -> list[str]:
    lines = [
        f"{name}: {_plain(path)}" for name, path in (("Image", evaluation.image), ("Truth", evaluation.truth)) if path
    ]
    return ["  \n".join(lines)] if lines else []


def _table(evaluation: Evaluation) -> str:
    videos = evaluation.videos
    rows = [
        ["", *(_plain(video.label) for video in videos)],
        ["---", *("---:" for _ in videos)],
        ["frames", *(str(video.num_frames) for video in videos)],
        ["size", *(f"{video.width}x{video.height}" for video in videos)],
    ]
    for metric in evaluation.metrics:
        cells = table_row(metric, videos)
        rows.append([_plain(heading(metric)), *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _meaning(metric: Metric) -> str:
    return (
        f"- **{_plain(metric.label)}**: {_plain(metric.formula)}. Range {_plain(metric.value_range)}; "
        f"{BETTER[metric.better][1]}. Source: {_plain(metric.source)}."
    )


def _plain(text: str) -> str:
    """Escape what would end a cell or start markup: names of files may hold anything."""
    for sign in "\\`*_|<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
