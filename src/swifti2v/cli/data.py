"""`swifti2v data ...`: look at a folder of videos before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from swifti2v.data.clips import ClipPlan
    from swifti2v.data.manifest import Manifest
    from swifti2v.data.report import Report

MAX_ROWS = 40

Cuts = Literal["split", "skip", "ignore"]
Extraction = Literal["head", "uniform", "slide"]

app = typer.Typer(help="Videos to train on: which can be used, and why the others cannot.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Videos to train on: which can be used, and why the others cannot."""


@app.command()
def check(  # noqa: PLR0913 - typer makes an option of each parameter
    folder: Annotated[Path, typer.Argument(help="Folder of videos with metadata.csv, .jsonl or .json, or captions.")],
    *,
    report: Annotated[
        Path | None, typer.Option(help="Also write the result for every scene to this file, .json or .csv.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Manifest file, relative to the folder; default: metadata.csv, .jsonl or .json.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Training size, WIDTHxHEIGHT; all buckets have about its area.")
    ] = "1280x704",
    size_multiple: Annotated[int, typer.Option(help="Bucket sides are multiples of this number.")] = 32,
    max_aspect: Annotated[float, typer.Option(help="Largest aspect ratio of a bucket; 1 allows --size only.")] = 2.0,
    frames: Annotated[int, typer.Option(help="Frames per clip, 4k+1.")] = 81,
    fps: Annotated[float, typer.Option(help="Frame rate to train at.")] = 16.0,
    min_source_fps: Annotated[
        float | None,
        typer.Option(help="Skip videos with a lower frame rate; default: 0.9 x --fps, so that no frame repeats."),
    ] = None,
    extraction: Annotated[
        Extraction,
        typer.Option(help="Where to cut clips from a scene: the first frames, evenly spread, or one after the other."),
    ] = "head",
    clips_per_scene: Annotated[int, typer.Option(help="Clips per scene for --extraction uniform.")] = 1,
    stride: Annotated[
        int | None, typer.Option(help="Frames from one clip to the next for --extraction slide; default: --frames.")
    ] = None,
    cuts: Annotated[
        Cuts, typer.Option(help="Split videos at cuts, skip videos that have cuts, or do not look for cuts.")
    ] = "split",
    keep_static: Annotated[bool, typer.Option(help="Keep scenes in which nothing moves.")] = False,
    keep_empty_captions: Annotated[bool, typer.Option(help="Keep videos without a caption.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Number of videos to read in parallel.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Read every video once and print what can be used; fails only if nothing can."""
    from swifti2v.cli.progress import progress_bars
    from swifti2v.data.buckets import BucketOptions, make_buckets
    from swifti2v.data.clips import ClipOptions, plan_clips
    from swifti2v.data.manifest import ManifestOptions, read_manifest
    from swifti2v.data.report import Report, check_report_path
    from swifti2v.data.validation import ValidationOptions, validate_videos
    from swifti2v.geometry import Size

    if report is not None:
        check_report_path(report)
    buckets = make_buckets(BucketOptions(Size.parse(size), size_multiple, max_aspect))
    clip_options = ClipOptions(frames, extraction, clips_per_scene, stride)
    options = ValidationOptions(
        fps=fps,
        min_frames=frames,
        # No bucket takes less: such videos are refused by their header, before they are decoded.
        min_short_side_pixels=min(min(bucket) for bucket in buckets),
        min_source_fps=min_source_fps,
        cuts=cuts,
        static_level=0.0 if keep_static else ValidationOptions.static_level,
    )
    captions: Literal["keep", "skip"] = "keep" if keep_empty_captions else "skip"
    listed = read_manifest(folder, ManifestOptions(manifest, captions))
    with progress_bars(quiet=as_json) as on_bar:
        validated = validate_videos(
            listed.entries,
            options,
            num_threads=threads,
            on_video=None if on_bar is None else lambda done, total: on_bar("videos", done, total),
        )
    plan = plan_clips(validated.scenes, buckets, clip_options, fps=fps)
    outcome = Report(fps, plan.scenes, (*validated.skipped, *plan.skipped, *listed.skipped))
    if report is not None:
        outcome.write(report)
    _print(listed, outcome, plan, as_json=as_json)
    if not plan.requests:
        msg = f"nothing in {str(folder)!r} can be used: {_most_frequent(outcome)}"
        raise InvalidInputError(msg)


def _most_frequent(outcome: Report) -> str:
    reason, count = next(iter(outcome.counts.items()))
    example = next(item for item in outcome.skipped if item.reason == reason)
    return f"{count} of {len(outcome.skipped)} are skipped as {reason!r}, the first {example.name}: {example.detail}"


def _print(listed: Manifest, outcome: Report, plan: ClipPlan, *, as_json: bool) -> None:
    buckets = _bucket_counts(plan)
    if as_json:
        import json

        typer.echo(json.dumps(outcome.as_mapping() | {"source": listed.source, "clips_by_bucket": buckets}, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(
        f"accepted {len(plan.requests)} clips from {outcome.num_videos} videos ({outcome.num_seconds:.0f} s usable), "
        f"listed in {listed.source}",
        highlight=False,
    )
    console.print(_table(("bucket", "clips"), [(name, str(count)) for name, count in buckets.items()]))
    if outcome.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in outcome.counts.items())
        console.print(f"skipped {len(outcome.skipped)}: {reasons}", highlight=False)
        rows = [(item.name, item.reason, item.detail) for item in outcome.skipped[:MAX_ROWS]]
        console.print(_table(("video", "reason", "detail"), rows))
        if len(outcome.skipped) > MAX_ROWS:
            console.print(f"and {len(outcome.skipped) - MAX_ROWS} more; --report writes all", highlight=False)


def _bucket_counts(plan: ClipPlan) -> dict[str, int]:
    from collections import Counter

    return dict(Counter(request.bucket for request in plan.requests).most_common())


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
