"""I2V, Quality and Total score of VBench-I2V from the scores of its dimensions.

Bounds and weights are those of `scripts/constant.py` of Vchitect/VBench at 45e79ec (2026-03-23); the sums are those of
its `scripts/cal_i2v_final_score.py` (`cal_final_score.py` beside it is for text-to-video and weighs otherwise). The
published rows come out, that of MAGI-1 for one: Quality 82.44, I2V 96.12, Total 89.28.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

RESULT_SUFFIX = "_eval_results.json"
"""How VBench ends the name of a file of results."""

LITTLE_MOTION = 0.1
"""Below this share of moving videos a high score says little: a still picture scores near 1 in five dimensions."""


@dataclass(frozen=True)
class Dimension:
    """What VBench-I2V judges, and how its score enters the totals.

    Args:
        name: as VBench's code and result files call it.
        group: the score that it is part of.
        minimum, maximum: the bounds that its score, a fraction, is normalized by; not clipped to them.
        weight: within its group.
    """

    name: str
    group: Literal["i2v", "quality"]
    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0

    def normalized(self, score: float) -> float:
        """Return ``(score - minimum) / (maximum - minimum)``; may be below 0 or above 1, as in VBench."""
        return (score - self.minimum) / (self.maximum - self.minimum)


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension("i2v_subject", "i2v", 0.1462),
    Dimension("i2v_background", "i2v", 0.2615),
    Dimension("camera_motion", "i2v", weight=0.1),
    Dimension("subject_consistency", "quality", 0.1462),
    Dimension("background_consistency", "quality", 0.2615),
    Dimension("motion_smoothness", "quality", 0.7060, 0.9975),
    Dimension("dynamic_degree", "quality", weight=0.5),
    Dimension("aesthetic_quality", "quality"),
    Dimension("imaging_quality", "quality"),
)
"""The nine that count. VBench also computes `temporal_flickering`, which is in none of its I2V scores."""

DIMENSION_NAMES: tuple[str, ...] = tuple(dimension.name for dimension in DIMENSIONS)


@dataclass(frozen=True)
class Totals:
    """Scores as fractions; the leaderboard shows them times 100.

    Args:
        i2v: likeness to the input image, and obedience to camera motion.
        quality: of the video by itself.
        total: the mean of both.
        scores: of the dimensions, as they went in.
        notes: what has to be known when the numbers are compared.
    """

    i2v: float
    quality: float
    total: float
    scores: Mapping[str, float]
    notes: tuple[str, ...] = ()


def check_dimensions(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in VBench's order, each once; raise `InvalidInputError` for one that does not count."""
    asked = set(names)
    unknown = sorted(asked - set(DIMENSION_NAMES))
    if unknown:
        msg = f"{', '.join(unknown)}: not a dimension of the VBench-I2V score; use {', '.join(DIMENSION_NAMES)}"
        raise InvalidInputError(msg)
    return tuple(name for name in DIMENSION_NAMES if name in asked)


def total_scores(scores: Mapping[str, float], *, missing_as_zero: bool = False) -> Totals:
    """Return the three scores.

    Args:
        scores: of the dimensions, fractions; `temporal_flickering` is left out, with a note.
        missing_as_zero: take a missing dimension as 0, as VBench's script does: the normalized value is then negative
            where the lower bound is above 0. Otherwise it is an error.

    Raises:
        InvalidInputError: an unknown or a missing dimension, or a score that is no fraction.
    """
    notes = []
    if "temporal_flickering" in scores:
        notes.append("temporal_flickering is left out: it is part of no VBench-I2V score")
    known = {name: score for name, score in scores.items() if name != "temporal_flickering"}
    check_dimensions(known)
    for name, score in known.items():
        if not (math.isfinite(score) and 0 <= score <= 1):
            msg = f"{name} is {score}; give fractions in [0, 1], for instance 0.9839 for 98.39%"
            raise InvalidInputError(msg)
    missing = [name for name in DIMENSION_NAMES if name not in known]
    if missing and not missing_as_zero:
        msg = f"no score of {', '.join(missing)}; score them, or count them as 0 (--missing-as-zero) as VBench does"
        raise InvalidInputError(msg)
    if missing:
        notes.append(f"counted as 0, so not to be compared with complete rows: {', '.join(missing)}")
    if known.get("dynamic_degree", 1.0) < LITTLE_MOTION:
        moving = f"{100 * known['dynamic_degree']:.1f}%"
        notes.append(f"only {moving} of the videos move: a still picture scores near 1 in five other dimensions")
    i2v, quality = (_group_score(group, known) for group in ("i2v", "quality"))
    return Totals(i2v, quality, (i2v + quality) / 2, known, tuple(notes))


def read_scores(path: Path) -> dict[str, float]:
    """Return the scores of the dimensions in a file or folder.

    Args:
        path: a file of VBench's results, a JSON object of plain scores by dimension, or a folder: every
            ``*_eval_results.json`` in it and below it counts.

    Raises:
        InvalidInputError: nothing there, another kind of file, or two files with unequal scores of a dimension.
    """
    files = sorted(path.rglob(f"*{RESULT_SUFFIX}")) if path.is_dir() else [path]
    if not files:
        msg = f"folder {str(path)!r} holds no *{RESULT_SUFFIX}; give the folder that `vbench score` wrote"
        raise InvalidInputError(msg)
    scores: dict[str, float] = {}
    for file in files:
        for name, result in read_results(file).items():
            score = _score_of(file, name, result)
            if scores.setdefault(name, score) != score:
                msg = f"{str(file)!r} has another score of {name} than a file beside it; keep one of them"
                raise InvalidInputError(msg)
    return scores


def read_results(file: Path) -> dict[str, Any]:
    """Return what a file of results holds, by dimension; raise `InvalidInputError` for another kind of file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{str(file)!r} cannot be read as results ({error}); score again"
        raise InvalidInputError(msg) from error
    if not isinstance(content, dict) or not content:
        msg = f"{str(file)!r} is not a JSON object of scores by dimension; give a *{RESULT_SUFFIX} of VBench"
        raise InvalidInputError(msg)
    return content


def _score_of(file: Path, name: str, result: Any) -> float:
    """Read a score: plain, ``[score, per video]``, or ``[score, per type, per video]`` (camera_motion)."""
    score = result[0] if isinstance(result, list) and result else result
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        msg = f"{str(file)!r} has no number as the score of {name} ({score!r:.40}); score that dimension again"
        raise InvalidInputError(msg)
    return float(score)


def _group_score(group: str, scores: Mapping[str, float]) -> float:
    members = [dimension for dimension in DIMENSIONS if dimension.group == group]
    weighted = math.fsum(member.weight * member.normalized(scores.get(member.name, 0.0)) for member in members)
    return weighted / math.fsum(member.weight for member in members)
