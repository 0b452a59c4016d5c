"""`swifti2v vbench ...`: the VBench-I2V benchmark, from its pictures to the three scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from swifti2v.evaluation.vbench.generation import ClipRecord
    from swifti2v.evaluation.vbench.total import Totals

SuiteArgument = Annotated[Path, typer.Argument(help="Folder that `prepare` made.")]
CheckoutOption = Annotated[Path, typer.Option("--vbench", help="A git checkout of Vchitect/VBench.")]
DimensionOption = Annotated[
    list[str] | None, typer.Option("--dimension", help="One of the nine dimensions; may be repeated. Default: all.")
]
SamplesOption = Annotated[int, typer.Option(help="Videos for each prompt: 5 for comparable scores.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

app = typer.Typer(
    help="The VBench-I2V benchmark: pictures, videos, scores. VBench runs in an environment of its own.",
    no_args_is_help=True,
)


@app.command()
def prepare(
    *,
    checkout: CheckoutOption,
    size: Annotated[str, typer.Option(help="Size of the videos, WIDTHxHEIGHT.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the suite.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures, such as VBench's crop_to_diff_ratio.py makes.")
    ] = None,
) -> None:
    """Cut the benchmark's pictures to the size of the videos, without distortion."""
    from swifti2v.evaluation.vbench.suite import prepare_suite

    suite = prepare_suite(checkout, output, size=Size.parse(size), images=images)
    for note in suite.notes:
        typer.echo(f"note: {note}", err=True)
    num_images = len({entry.image_name for entry in suite.prompts})
    typer.echo(f"{output}: {num_images} pictures of {suite.size}, {len(suite.prompts)} prompts")


@app.command()
def generate(  # noqa: PLR0913 - typer makes an option of each parameter
    suite: SuiteArgument,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; a stopped run continues.")],
    model: Annotated[str, typer.Option(help="As in `swifti2v generate`, or `still` for the control.")] = "wan2.2",
    options: Annotated[Path | None, typer.Option(help="YAML or JSON of generation options.")] = None,
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the files.")] = None,
    many_step: Annotated[bool, typer.Option(help="Stage I without its few-step adapters.")] = False,
    dimension: DimensionOption = None,
    samples: SamplesOption = 5,
    seed: Annotated[int, typer.Option(help="Seed from which the seed of every clip follows.")] = 0,
    shard: Annotated[str, typer.Option(help="Make only part i of n: 1/4 to 4/4.")] = "1/1",
    limit: Annotated[int | None, typer.Option(help="Make only the first N clips, to try things out.")] = None,
    ray_workers: Annotated[int | None, typer.Option(help="Spread the work over N workers of Ray Data.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Make the videos under the names that VBench looks for; those that are there are kept."""
    from swifti2v.evaluation.vbench.clips import Shard, clips_of
    from swifti2v.evaluation.vbench.generation import make_videos, open_run
    from swifti2v.evaluation.vbench.makers import MakerSettings
    from swifti2v.evaluation.vbench.suite import load_suite

    part = Shard.parse(shard)
    loaded = load_suite(suite)
    clips = part.select(clips_of(loaded, dimensions=dimension, num_samples=samples, seed=seed))[:limit]
    chosen = _options(options, frames, fps)
    settings = MakerSettings(model, loaded.size, chosen, device, few_step=not many_step)
    if ray_workers is not None:
        from swifti2v.evaluation.vbench.ray_workers import RayJob, make_videos_with_ray

        job = RayJob(output.resolve(), settings, seed)
        gpus = 0.0 if device == "cpu" else 1.0
        made = make_videos_with_ray(clips, job, num_workers=ray_workers, gpus_per_worker=gpus, on_clip=_tell)
    else:
        run, maker = open_run(output, settings, seed=seed)
        made = make_videos(clips, maker, run, record_name=part.record_name, on_clip=_tell)
    typer.echo(f"{output / 'videos'}: {made} videos made, {len(clips) - made} were there")


@app.command()
def score(  # noqa: PLR0913 - typer makes an option of each parameter
    videos: Annotated[Path, typer.Argument(help="Folder that holds only the videos: RUN/videos.")],
    *,
    suite: Annotated[Path, typer.Option(help="Folder that `prepare` made.")],
    checkout: CheckoutOption,
    python: Annotated[str, typer.Option(help="The Python of VBench's own environment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; scored dimensions are kept.")],
    dimension: DimensionOption = None,
    samples: SamplesOption = 5,
    allow_missing: Annotated[bool, typer.Option(help="Score an incomplete set of videos.")] = False,
    local_weights: Annotated[bool, typer.Option(help="Look for weights in VBench's cache first.")] = False,
    device: Annotated[str, typer.Option(help="Device that VBench runs on; i2v_background needs a CUDA card.")] = "cuda",
) -> None:
    """Let VBench score the videos, a process for each dimension."""
    from swifti2v.evaluation.vbench.scoring import Judge, score_videos
    from swifti2v.evaluation.vbench.suite import load_suite
    from swifti2v.evaluation.vbench.total import DIMENSION_NAMES

    scoring = score_videos(
        videos,
        load_suite(suite),
        Judge(checkout, python, device, local_weights),
        output,
        dimensions=dimension or DIMENSION_NAMES,
        num_samples=samples,
        allow_missing=allow_missing,
        on_dimension=lambda name, count: typer.echo(f"scoring {name}, {count} videos", err=True),
    )
    for note in scoring.notes:
        typer.echo(f"note: {note}", err=True)
    for name, value in scoring.scores.items():
        typer.echo(f"{name:<24}{100 * value:7.2f}")


@app.command()
def total(
    results: Annotated[Path, typer.Argument(help="Folder that `score` wrote, or a JSON file of scores.")],
    *,
    missing_as_zero: Annotated[bool, typer.Option(help="Count missing dimensions as 0, as VBench does.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the I2V, Quality and Total score."""
    from swifti2v.evaluation.vbench.total import read_scores, total_scores

    if not results.exists():
        msg = f"{str(results)!r} does not exist; give the folder that `vbench score` wrote"
        raise InvalidInputError(msg)
    totals = total_scores(read_scores(results), missing_as_zero=missing_as_zero)
    if as_json:
        typer.echo(json.dumps(asdict(totals)))
        return
    for note in totals.notes:
        typer.echo(f"note: {note}", err=True)
    _print_totals(totals)


def _print_totals(totals: Totals) -> None:
    for name, value in totals.scores.items():
        typer.echo(f"{name:<24}{100 * value:7.2f}")
    for label, value in (("I2V", totals.i2v), ("Quality", totals.quality), ("Total", totals.total)):
        typer.echo(f"{label:<24}{100 * value:7.2f}")


def _options(path: Path | None, frames: int | None, fps: float | None) -> dict[str, Any]:
    from swifti2v.config import read_yaml
    from swifti2v.settings import checked_choices

    choices = checked_choices({} if path is None else read_yaml(path))
    if choices.keys() & {"size", "seed"}:
        msg = f"{str(path)!r} sets size or seed; the suite decides the size, --seed the seeds of the clips"
        raise InvalidInputError(msg)
    return choices | checked_choices({"num_frames": frames, "fps": fps})


def _tell(done: int, count: int, record: ClipRecord | None) -> None:
    if record is not None:
        typer.echo(f"{done}/{count} {record.video}: {record.seconds:.1f} s", err=True)
