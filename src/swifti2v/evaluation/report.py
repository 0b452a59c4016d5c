"""The report page of an evaluation: one HTML file that holds everything it shows and opens without a network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swifti2v.errors import OutputError
from swifti2v.evaluation.media_files import place_media
from swifti2v.evaluation.report_figures import make_plots, series_number
from swifti2v.evaluation.report_pictures import make_pictures, video_sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.evaluation.results import Better, Evaluation, Metric, VideoResult
    from swifti2v.evaluation.sources import FrameSource

FILE_NAME = "report.html"
EMBED_LIMIT_BYTES = 60_000_000
"""Videos of this much together go into the page; more would make browsers slow to open it."""

DASH = "\N{EN DASH}"
BETTER = {
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
    "one": ("\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}1", "best is 1"),
    "zero": ("\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}0", "best is 0"),
    "neither": ("", "neither high nor low is good: read it beside the others"),
}
"""Sign and words for each value of `Metric.better`."""

# Matroska is played by some browsers only; MP4's name makes those that can read QuickTime files try.
_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}
_MINUS = "\N{MINUS SIGN}"
_DIGITS = 4


@dataclass(frozen=True)
class Cell:
    """A number of the table: as it is shown, and whether none of the ranked videos has a better one."""

    text: str
    best: bool


@dataclass(frozen=True)
class Player:
    """A video to be played: `uri` is a data URI, an address in its folder, or None if browsers cannot play it."""

    label: str
    uri: str | None


def write_report(evaluation: Evaluation, folder: Path, *, embed_limit_bytes: int = EMBED_LIMIT_BYTES) -> Path:
    """Write ``report.html`` into `folder` (made if missing) and return its path.

    Every video is read once. Videos of up to `embed_limit_bytes` together are put into the page; larger ones are
    copied into `folder`/media unless they stand in `folder` already, and the page says so: the folder can be moved. An
    older report of that name is replaced only when the new one is whole.

    Raises:
        VideoInputError: a video is missing, truncated or damaged.
        ImageInputError: the image is missing or unreadable.
        OutputError: matplotlib or jinja2 is not installed, or a file cannot be written.
    """
    template = _template()
    sources = video_sources(evaluation)
    embedded = sum(_path(source).stat().st_size for source in sources) <= embed_limit_bytes
    playable = [_path(source) for source in sources if _media_type(source) is not None]
    addresses = {} if embedded else place_media(playable, folder)
    page = template.render(
        evaluation=evaluation,
        series={video.label: series_number(index) for index, video in enumerate(evaluation.videos)},
        image_name=None if evaluation.image is None else Path(evaluation.image).name,
        truth_name=None if evaluation.truth is None else Path(evaluation.truth).name,
        file_names={video.label: Path(video.path).name for video in evaluation.videos if video.path is not None},
        rows=[(metric, table_row(metric, evaluation.videos)) for metric in evaluation.metrics],
        better=BETTER,
        plots=[(_metric(evaluation, plot.metric), plot) for plot in make_plots(evaluation)],
        pictures=make_pictures(evaluation),
        players=[_player(source, addresses) for source in sources],
        embedded=embedded,
        first=sources[0] if sources else None,
        settings=[(str(name), setting_text(value)) for name, value in evaluation.settings.items()],
    )
    return _write(page, folder)


def table_row(metric: Metric, videos: Sequence[VideoResult]) -> list[Cell]:
    """Return the cells of a metric, one per video.

    The best are marked among videos that have a file (a control in memory, like a still image, wins what it cannot
    lose) if there are at least two of them with a number; equal ones all.
    """
    values = [video.values.get(metric.name, math.nan) for video in videos]
    texts = number_texts(values)
    ranked = [
        index for index, video in enumerate(videos) if video.path is not None and not math.isnan(float(values[index]))
    ]
    best: set[str] = set()
    if len(ranked) > 1 and metric.better != "neither":
        best = {texts[min(ranked, key=lambda index: _badness(values[index], metric.better))]}
    return [Cell(text, index in ranked and text in best) for index, text in enumerate(texts)]


def number_texts(values: Sequence[float]) -> list[str]:
    """Return numbers of one row with the same decimals: four digits of the largest; a dash for NaN."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest = max(finite, default=0.0)
    decimals = 0 if largest == 0 else min(max(_DIGITS - 1 - math.floor(math.log10(largest)), 0), 6)

    def text(value: float) -> str:
        if math.isnan(value):
            return DASH
        if math.isinf(value):
            return "\N{INFINITY}" if value > 0 else f"{_MINUS}\N{INFINITY}"
        shown = f"{value:.2e}" if 0 < largest < 10 ** (1 - _DIGITS) else f"{value:.{decimals}f}"
        return shown.replace("-", _MINUS)

    return [text(float(value)) for value in values]


def setting_text(value: Any) -> str:
    """Return a setting as people read it: nested ones as JSON, without as None and True without capitals."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else f"{value}"


def _badness(value: float, better: Better) -> float:
    return {"higher": -value, "lower": value, "one": abs(value - 1), "zero": abs(value)}[better]


def _metric(evaluation: Evaluation, name: str) -> Metric | None:
    return next((metric for metric in evaluation.metrics if metric.name == name), None)


def _path(source: FrameSource) -> Path:
    return Path(source.path or "")


def _media_type(source: FrameSource) -> str | None:
    return _MEDIA_TYPES.get(_path(source).suffix.lower())


def _player(source: FrameSource, addresses: Mapping[Path, str]) -> Player:
    path, media_type = _path(source), _media_type(source)
    if media_type is None or path in addresses:
        return Player(source.label, addresses.get(path))
    data = base64.b64encode(path.read_bytes()).decode()
    return Player(source.label, f"data:{media_type};base64,{data}")


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        msg = "a report needs jinja2, which is not installed; run: pip install 'swifti2v[evaluate]'"
        raise OutputError(msg) from error
    assets = resources.files("swifti2v.evaluation") / "assets"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name, file in (("style", "report.css"), ("script", "report.js")):
        environment.globals[name] = (assets / file).read_text(encoding="utf-8")
    return environment.from_string((assets / "report.html.jinja").read_text(encoding="utf-8"))


def _write(page: str, folder: Path) -> Path:
    path = folder / FILE_NAME
    part = folder / f".{FILE_NAME}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        msg = f"report {str(path)!r} cannot be written ({error.strerror}); make the folder writable or choose another"
        raise OutputError(msg) from error
    return path
