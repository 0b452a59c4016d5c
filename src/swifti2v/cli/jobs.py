"""`swifti2v jobs ...`: the queue of generation jobs from the command line."""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.stage_one_options import StageOneSampling, with_stage_one_options
from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.runner import PipelineRunner
    from swifti2v.jobs.state import Job, JobStage
    from swifti2v.jobs.worker import Worker
    from swifti2v.pipelines.acceleration import Acceleration

DEFAULT_DATA = Path("swifti2v-data")

ImageArgument = Annotated[Path, typer.Argument(help="The input image.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, as `submit` printed it.")]
DataOption = Annotated[Path, typer.Option(envvar="SWIFTI2V_DATA", help="Data folder: the queue and its files.")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(envvar="SWIFTI2V_DATABASE", help="URL of the queue's database; default: SQLite in the data folder."),
]
MemoryOption = Annotated[str | None, typer.Option(help="Device memory that a run may take: auto, 24GiB, ...")]
StageOption = Annotated[
    Literal["one", "two", "both"], typer.Option(help="Stage that a worker does, and whose networks alone it loads.")
]
ManyStepOption = Annotated[
    bool, typer.Option("--many-step", help="Load Stage I without its few-step adapters, for many steps with guidance.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(help="Queue videos, watch them, cancel them; work on the queue.", no_args_is_help=True)


@app.command()
@with_stage_one_options
def submit(  # noqa: PLR0913 - typer makes an option of each parameter
    image: ImageArgument,
    *,
    prompt: Annotated[str, typer.Option(help="What should move, and how.")] = "",
    model: Annotated[str, typer.Option(help="Checkpoint, by the name that the workers have.")] = "wan2.2",
    size: Annotated[str | None, typer.Option(help="Output size, WIDTHxHEIGHT, multiples of 32.")] = None,
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Stage II.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of Stage II.")] = None,
    segment_size: Annotated[int | None, typer.Option(help="Latent frames that a segment makes.")] = None,
    stage_one: StageOneSampling,
    preview: Annotated[bool, typer.Option("--preview", help="Stage I only; `jobs continue` makes the video.")] = False,
    max_attempts: Annotated[int, typer.Option(min=1, help="Workers that may die of it before it fails.")] = 3,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Queue a video, and print the name of its job."""
    from swifti2v.jobs.state import JobRequest
    from swifti2v.media.images import load_image
    from swifti2v.pipelines.loading import settings_of
    from swifti2v.settings import plain_choices

    choices = {
        "size": size,
        "num_frames": frames,
        "fps": fps,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "segment_size": segment_size,
        **stage_one.choices(),
    }
    loaded = load_image(image)
    settings_of(model, choices)  # what can be found wrong now should not be found by a worker
    request = JobRequest(model, prompt, plain_choices(choices), loaded.notes, preview=preview)
    typer.echo(_open(data, database).submit(loaded.image, request, max_attempts=max_attempts).id)


@app.command("continue")
def continue_preview(job: JobArgument, *, data: DataOption = DEFAULT_DATA, database: DatabaseOption = None) -> None:
    """Queue the video of a finished preview, and print the name of its job; Stage I is not run again."""
    typer.echo(_open(data, database).continue_preview(job).id)


@app.command()
def batch(  # noqa: PLR0913 - as above
    folder: Annotated[Path, typer.Argument(help="Pictures; the text of picture.txt is the prompt of picture.jpg.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the videos; made if it is missing.")],
    prompt: Annotated[str, typer.Option(help="Of pictures without a text of their own.")] = "",
    model: Annotated[str, typer.Option(help="Checkpoint, by the name that the workers have.")] = "wan2.2",
    size: Annotated[str | None, typer.Option(help="Output size, WIDTHxHEIGHT, multiples of 32.")] = None,
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Make a video of every picture in a folder, on all workers of the queue; a repeated call goes on where it was."""
    from swifti2v.pipelines.loading import settings_of

    queue = _open(data, database)  # says what to install, before the module below needs it
    from swifti2v.jobs.batch import Batch, pictures_in

    choices = {"size": size, "num_frames": frames, "seed": seed}
    settings_of(model, choices)
    work = Batch(queue, output, model=model, choices=choices)
    failures = work.run(pictures_in(folder, prompt=prompt), on_change=typer.echo)
    if failures:
        msg = f"{len(failures)} of the videos failed ({failures[0]}); see `swifti2v jobs show`, and run again"
        raise InvalidInputError(msg)


@app.command("list")
def list_jobs(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Jobs at most, the newest first.")] = 20,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the jobs, the newest first."""
    queue = _open(data, database)
    jobs = queue.store.list(limit=limit)
    if as_json:
        typer.echo(json.dumps([_described(queue, job) for job in jobs]))
        return
    for job in jobs:
        prompt = " ".join(job.request.prompt.split())[:60]
        typer.echo(f"{job.id}  {job.state.value:<11} {job.progress.percent:>3}%  {job.request.model}  {prompt}")


@app.command()
def show(job: JobArgument, *, data: DataOption = DEFAULT_DATA, database: DatabaseOption = None) -> None:
    """Print everything about a job as JSON; `video` is the file of a finished one."""
    queue = _open(data, database)
    typer.echo(json.dumps(_described(queue, queue.store.get(job)), indent=2))


@app.command()
def cancel(
    job: JobArgument,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the job and its files too.")] = False,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Cancel a job; one at work stops within one denoising step."""
    queue = _open(data, database)
    known = queue.remove(job) if remove else queue.store.cancel(job)
    typer.echo(f"{known.id}: {'removed' if remove else known.state.value}")


@app.command()
@with_acceleration_options
def work(  # noqa: PLR0913 - typer makes an option of each parameter
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="Take only jobs of this checkpoint; may be given several times.")
    ] = None,
    stage: StageOption = "both",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA if there is one.")] = None,
    memory: MemoryOption = None,
    many_step: ManyStepOption = False,
    accelerated_by: AccelerationOptions,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when the queue is empty.")] = False,
    lease: Annotated[float, typer.Option(min=0.5, help="Seconds after which a silent worker counts as dead.")] = 30.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that a job may still run after SIGTERM.")] = 0.0,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", hidden=True, help="Stop when standard input closes: for `serve`.")
    ] = False,
    preload: Annotated[bool, typer.Option(help="Load the first model before the first job.")] = True,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Work on the queue until stopped; SIGTERM or Ctrl-C gives the job at work back, to be continued by another."""
    queue = _open(data, database)  # says what to install, before the modules below need it
    from swifti2v.jobs.state import ALL_STAGES, JobStage
    from swifti2v.jobs.worker import Worker, WorkerOptions

    log_to_stderr()
    stages = {"one": (JobStage.ONE,), "two": (JobStage.TWO,), "both": ALL_STAGES}[stage]
    runner = pipeline_runner(device, memory, accelerated_by.acceleration(), stages, few_step=not many_step)
    if model and preload:
        runner.pipeline(model[0])
    options = WorkerOptions(models=model or None, stages=stages, lease_seconds=lease, grace_seconds=grace)
    worker = Worker(queue.store, queue.files, runner, options=options)
    if stop_with_stdin:
        threading.Thread(target=_drain_at_end_of_input, args=(worker,), daemon=True).start()
    with _draining_on_signals(worker):
        count = worker.run(until_idle=until_idle)
    typer.echo(f"{worker.name}: worked on {count} jobs", err=True)


@app.command()
def prune(
    *,
    max_age_hours: Annotated[float | None, typer.Option(min=0, help="Remove finished jobs older than this.")] = None,
    max_gigabytes: Annotated[float | None, typer.Option(min=0, help="Keep the newest up to so much.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Remove old finished jobs, what is left of removed ones, and files without a job."""
    from swifti2v.jobs.retention import RetentionPolicy
    from swifti2v.jobs.retention import prune as prune_queue

    policy = RetentionPolicy(
        max_age_seconds=None if max_age_hours is None else max_age_hours * 3600,
        max_bytes=None if max_gigabytes is None else int(max_gigabytes * 1e9),
    )
    pruned = prune_queue(_open(data, database), policy)
    typer.echo(f"removed {pruned.num_jobs} jobs, {pruned.num_bytes / 1e6:.1f} MB")


def _open(data: Path, database: str | None) -> JobQueue:
    try:
        from swifti2v.jobs.queue import JobQueue
    except ModuleNotFoundError as error:
        from swifti2v.errors import ConfigurationError

        msg = f"the queue needs {error.name}; install it with: pip install 'swifti2v[serve]'"
        raise ConfigurationError(msg) from error
    return JobQueue.open(data, url=database)


def _described(queue: JobQueue, job: Job) -> dict[str, Any]:
    from swifti2v.jobs.state import JobState

    described = asdict(job)
    del described["lease_token"]
    files = queue.result_files(job)
    described["video"] = str(files.video) if files is not None and job.state is JobState.COMPLETED else None
    return described


def pipeline_runner(
    device: str | None,
    memory: str | None,
    acceleration: Acceleration,
    stages: Collection[JobStage] | None = None,
    *,
    few_step: bool = True,
) -> PipelineRunner:
    """Return what does the work of jobs, or some stages of it, on a device, within limits of its memory if any."""
    from swifti2v.cli.generate import quiet_libraries
    from swifti2v.jobs.runner import PipelineRunner
    from swifti2v.jobs.state import ALL_STAGES

    quiet_libraries()
    return PipelineRunner.on_device(
        device, memory, acceleration=acceleration, stages=stages or ALL_STAGES, few_step=few_step
    )


@contextmanager
def _draining_on_signals(worker: Worker) -> Iterator[None]:
    """Let the first signal end the work in good order; a second one ends it as it does everywhere."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    usual = {number: signal.getsignal(number) for number in numbers}

    def drain(number: int, _frame: object) -> None:
        worker.drain()
        signal.signal(number, usual[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, drain)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, usual[number])


def _drain_at_end_of_input(worker: Worker) -> None:
    sys.stdin.buffer.read()
    worker.drain()


def log_to_stderr() -> None:
    """Say on the standard error what workers do."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("swifti2v.jobs").setLevel(logging.INFO)
