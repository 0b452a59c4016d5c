"""What an evaluation found: plain values that a table, a report and a JSON file are made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.errors import VideoInputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Better = Literal["higher", "lower", "one", "zero", "neither"]
"""Which values are good; `one` and `zero`: the nearer to it; `neither`: to be read beside the others."""

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Args:
        name: key of `VideoResult.values` and of its curves.
        label: heading of its column, with the unit.
        better: which values are good.
        value_range: for instance ``0 .. 100``.
        formula: in words or symbols, the optical flow named where one is used.
        source: paper or package.
    """

    name: str
    label: str
    better: Better
    value_range: str
    formula: str
    source: str


@dataclass(frozen=True)
class Curve:
    """A metric over time: `values[i]` belongs to frame `frames[i]`; NaN where it is not defined."""

    metric: str
    frames: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class VideoResult:
    """What was found of one video.

    Args:
        label: short name, unique in an evaluation.
        path: of the file; None for a control that exists in memory only (the still image).
        width, height, num_frames, fps: of the video as it was judged.
        values: a number for each metric that could be computed; NaN where it is not defined.
        curves: metrics over time.
        notes: what was adapted or could not be judged, a sentence each.
    """

    label: str
    path: str | None
    width: int
    height: int
    num_frames: int
    fps: float
    values: Mapping[str, float]
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Videos judged together.

    Args:
        videos: the judged ones, in the order given, controls and rivals after them.
        metrics: what the numbers mean, in the order of columns.
        image: path of the input image, if there was one.
        truth: path of the true video, if there was one.
        settings: what was asked for, and versions of packages.
    """

    videos: tuple[VideoResult, ...]
    metrics: tuple[Metric, ...]
    image: str | None = None
    truth: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        """Write everything as JSON; NaN becomes null."""
        content = {"format": FORMAT, **_without_nan(asdict(self))}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_evaluation(path: Path) -> Evaluation:
    """Read what `Evaluation.write_json` wrote; raise `VideoInputError` for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise KeyError("format")
        videos = tuple(_video(entry) for entry in content.pop("videos"))
        metrics = tuple(Metric(**entry) for entry in content.pop("metrics"))
        return Evaluation(videos, metrics, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"{path} is not an evaluation of this version ({error}); make it again with swifti2v evaluate"
        raise VideoInputError(msg) from error


def _video(entry: dict[str, Any]) -> VideoResult:
    curves = tuple(
        Curve(each["metric"], tuple(each["frames"]), tuple(map(_number, each["values"]))) for each in entry["curves"]
    )
    values = {name: _number(value) for name, value in entry["values"].items()}
    return VideoResult(**{**entry, "values": values, "curves": curves, "notes": tuple(entry["notes"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
