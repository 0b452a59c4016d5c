"""What an evaluation found: plain values that the table, the report and the JSON file are made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Better = Literal["higher", "lower", "one", "zero", "neither"]
"""Which values are good; `one` and `zero`: the nearer to it; `neither`: to be read beside the others."""

FORMAT = 2


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Args:
        name: key of `VideoResult.values` and of its curves.
        label: heading of its row, with the unit.
        better: which values are good.
        meaning: the formula in words, the optical flow named where one is used, the range, and the source.
    """

    name: str
    label: str
    better: Better
    meaning: str


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
        notes: what was adapted, what could not be judged, and how the video moves, a sentence each.
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
        videos: the judged ones in the order given, then rivals, then the control.
        metrics: what the numbers mean, in the order of the table.
        image: path of the input image, if there was one.
        truth: path of the true video, if there was one.
        settings: what was asked for, and versions of packages.
    """

    videos: tuple[VideoResult, ...]
    metrics: tuple[Metric, ...]
    image: str | None = None
    truth: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything as JSON; NaN becomes null."""
        return json.dumps({"format": FORMAT, **without_nan(asdict(self))}, indent=1, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Return a value of dicts, lists and numbers as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
