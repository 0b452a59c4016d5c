"""`swifti2v evaluate`: what can be measured of videos, as a table, as files, as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swifti2v.cli.progress import progress_bars
from swifti2v.errors import InvalidInputError, OutputError

if TYPE_CHECKING:
    from swifti2v.evaluation.results import Evaluation

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"
OF_REPORTS = ("jinja2", "matplotlib")
"""What the page of a report needs; the extra `evaluate` installs it."""

VideosArgument = Annotated[list[Path], typer.Argument(help="Videos to judge; all at the size of the first.")]
ImageOption = Annotated[Path | None, typer.Option(help="The input image.")]
TruthOption = Annotated[Path | None, typer.Option(help="The true video, of the video's size or larger.")]
AgainstOption = Annotated[list[Path] | None, typer.Option(help="Another video for the same table; may be repeated.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for results.json, results.md and report.html.")
]
SegmentOption = Annotated[
    str, typer.Option(help="Latent frames in a segment, or auto: the size of 2 to 8 whose seams show most.")
]
CvvdpOption = Annotated[
    str | None,
    typer.Option(metavar="PYTHON", help="Python of an environment with cvvdp: ColorVideoVDP too; seconds a frame."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def evaluate(
    videos: VideosArgument,
    *,
    image: ImageOption = None,
    truth: TruthOption = None,
    against: AgainstOption = None,
    output: OutputOption = None,
    segment_size: SegmentOption = "3",
    cvvdp: CvvdpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge videos: against their image, against the truth, by themselves."""
    from swifti2v.evaluation.evaluate import EvaluationRequest, evaluate_videos

    started = time.monotonic()
    request = EvaluationRequest(
        tuple(videos),
        tuple(against or ()),
        image=image,
        truth=truth,
        segment_size=_segment_size(segment_size),
        cvvdp=cvvdp,
    )
    if output is not None:
        _check_output(output)
    with progress_bars(quiet=as_json) as on_progress:
        evaluation = evaluate_videos(request, on_progress=on_progress)
    files = [] if output is None else _write(evaluation, output)
    if as_json:
        typer.echo(json.dumps(_summary(evaluation, files, seconds=time.monotonic() - started), allow_nan=False))
        return
    Console().print(evaluation_table(evaluation))
    for video in evaluation.videos:
        for note in video.notes:
            typer.echo(f"note: {video.label}: {note}", err=True)
    for file in files:
        typer.echo(str(file))


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return a table with a row per metric and a column per video, the best number of a row in bold."""
    from swifti2v.evaluation.tables import heading, table_row

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for video in evaluation.videos:
        table.add_column(escape(video.label), justify="right", overflow="fold")
    for metric in evaluation.metrics:
        cells = table_row(metric, evaluation.videos)
        table.add_row(heading(metric), *(f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in cells))
    return table


def _segment_size(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        msg = f"segment size {text!r} is not known; use a number from 2 on, or auto"
        raise InvalidInputError(msg) from error


def _check_output(folder: Path) -> None:
    """Raise `OutputError` unless a report can be made and written there; called before the long work."""
    from importlib.util import find_spec

    from swifti2v.media.atomic_files import make_folder, write_atomically

    missing = [name for name in OF_REPORTS if find_spec(name) is None]
    if missing:
        msg = f"--output needs {' and '.join(missing)}; install what is missing with: pip install 'swifti2v[evaluate]'"
        raise OutputError(msg)
    make_folder(folder)
    trial = folder / ".trial"
    write_atomically(trial, b"")
    trial.unlink()


def _write(evaluation: Evaluation, folder: Path) -> list[Path]:
    from swifti2v.evaluation.report import write_report
    from swifti2v.evaluation.tables import markdown
    from swifti2v.media.atomic_files import write_atomically

    numbers, page = folder / RESULTS_JSON, folder / RESULTS_MARKDOWN
    write_atomically(numbers, evaluation.to_json().encode())
    write_atomically(page, markdown(evaluation).encode())
    return [numbers, page, write_report(evaluation, folder)]


def _summary(evaluation: Evaluation, files: list[Path], *, seconds: float) -> dict[str, Any]:
    """Return what ``--json`` prints: numbers without curves, null where a measure is not defined."""
    from swifti2v.evaluation.results import without_nan

    videos = [
        {
            "label": video.label,
            "path": video.path,
            "size": f"{video.width}x{video.height}",
            "num_frames": video.num_frames,
            "fps": video.fps,
            "values": without_nan(dict(video.values)),
            "notes": list(video.notes),
        }
        for video in evaluation.videos
    ]
    return {"videos": videos, "files": [str(file) for file in files], "seconds": round(seconds, 2)}
