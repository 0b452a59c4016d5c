"""What every benchmark does with its numbers: Markdown on standard output, JSON beside the code, progress on stderr.

Nothing heavy is imported here: `benchmarks/memory.py` measures child processes and has to stay small itself.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "opencv-python-headless", "numpy", "av", "vmaf-torch")


def say(message: str) -> None:
    """Write a line of progress to standard error."""
    print(message, file=sys.stderr, flush=True)


def hardware() -> str:
    """Return the name of this machine in results, for instance ``cpu2-x86_64``."""
    return f"cpu{os.cpu_count()}-{platform.machine()}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is flushed left, the others right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as a cell of a table; ``-`` for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are there (not None, not NaN); NaN if none is."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def add_result_arguments(parser: argparse.ArgumentParser, *, pictures: bool = True) -> None:
    """Add ``--output`` and ``--pictures``."""
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/<theme>_<hardware>_<date>")
    if pictures:
        parser.add_argument("--pictures", type=Path, help="folder for pictures; default: none are made")


def write_between(document: Path, content: str, *, begin: str, end: str) -> None:
    """Put `content` between the marks of a document.

    Raises:
        ValueError: the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        msg = f"{document} has no marks {begin} and {end}; put them where the table is to stand"
        raise ValueError(msg)
    document.write_text(
        f"{text.partition(begin)[0]}{begin}\n\n{content}\n\n{end}{text.partition(end)[2]}", encoding="utf-8"
    )


def png_of(figure: Any) -> Any:
    """Return a matplotlib figure as a picture, uint8 [H, W, 3]."""
    import io

    import numpy as np
    import PIL.Image
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=100)
        return np.asarray(PIL.Image.open(file).convert("RGB"))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run was told, for its JSON, with the versions of what it stands on."""
    told = {name: value for name, value in vars(arguments).items() if name not in {"output", "pictures"}}
    return {name: _plain(value) for name, value in told.items()} | {"versions": _versions()}


def write_results(theme: str, content: Mapping[str, Any], output: Path | None) -> Path:
    """Write the JSON of a benchmark and return its path; NaN and infinity become null."""
    date = dt.datetime.now(dt.UTC).date().isoformat()
    path = output or RESULTS / f"{theme}_{hardware()}_{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_asdict"):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, Path):
        return value.name  # where it lies is a matter of the machine
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
