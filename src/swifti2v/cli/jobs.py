"""`swifti2v jobs ...`: the queue of generation jobs from the command line."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.option_groups import with_option_group
from swifti2v.cli.setting_options import with_setting_options
from swifti2v.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.runner import PipelineRunner
    from swifti2v.jobs.state import Job, JobStage
    from swifti2v.jobs.worker import Worker
    from swifti2v.runner.acceleration import Acceleration

DEFAULT_DATA = Path("swifti2v-data")

ImageArgument = Annotated[Path, typer.Argument(help="The input image.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, as `submit` printed it.")]
ModelOption = Annotated[str, typer.Option(help="Checkpoint, by the name that the workers have.")]
SizeOption = Annotated[str | None, typer.Option(help="Output size, WIDTHxHEIGHT, multiples of 32.")]
FramesOption = Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the noise.")]
DataOption = Annotated[Path, typer.Option(envvar="SWIFTI2V_DATA", help="Data folder: the queue and its files.")]
MemoryOption = Annotated[str | None, typer.Option(help="Device memory that a run may take: auto, 24GiB, ...")]
StageOption = Annotated[
    Literal["one", "two", "both"], typer.Option(help="Stage that a worker does; it loads the networks of that alone.")
]
ManyStepOption = Annotated[
    bool, typer.Option("--many-step", help="Load Stage I without its few-step adapters, for many steps with guidance.")
]
LeaseOption = Annotated[float, typer.Option(min=0.5, help="Seconds after which a silent worker counts as dead.")]
GraceOption = Annotated[float, typer.Option(min=0, help="Seconds that a job may still run after SIGTERM.")]


@dataclass(frozen=True)
class QueueOptions:
    """Which queue, as options of every command over one; `with_queue_options` gives them to a command."""

    data: DataOption = DEFAULT_DATA
    database: Annotated[
        str | None,
        typer.Option(envvar="SWIFTI2V_DATABASE", help="URL of the queue's database; default: SQLite in --data."),
    ] = None

    def open(self) -> JobQueue:
        """Open the queue; raise `ConfigurationError` if a package for it is missing."""
        need_packages("sqlalchemy", extra="serve")
        from swifti2v.jobs.queue import JobQueue

        return JobQueue.open(self.data, url=self.database)


with_queue_options = partial(with_option_group, parameter="queue", group=QueueOptions)
"""Decorator: the options stand in place of the parameter `queue`, a `QueueOptions`."""


def need_packages(*names: str, extra: str) -> None:
    """Raise `ConfigurationError`, with what to install, if a package is missing."""
    from importlib import import_module

    try:
        for name in names:
            import_module(name)
    except ModuleNotFoundError as error:
        msg = f"this command needs {error.name}; install it with: pip install 'swifti2v[{extra}]'"
        raise ConfigurationError(msg) from error


app = typer.Typer(help="Queue videos, watch them, cancel them; work on the queue.", no_args_is_help=True)


@app.command()
@with_setting_options
@with_queue_options
def submit(
    image: ImageArgument,
    *,
    prompt: Annotated[str, typer.Option(help="What should move, and how.")] = "",
    model: ModelOption = "wan2.2",
    choices: dict[str, Any],
    preview: Annotated[bool, typer.Option("--preview", help="Stage I only; `jobs continue` makes the video.")] = False,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Fail the job after this many workers have crashed on it.")
    ] = 3,
    queue: QueueOptions,
) -> None:
    """Queue a video, and print the name of its job."""
    from swifti2v.jobs.state import JobRequest
    from swifti2v.media.images import load_image
    from swifti2v.runner.loading import settings_of
    from swifti2v.settings import plain_choices

    loaded = load_image(image)
    settings_of(model, choices)  # what can be found wrong now should not be found by a worker
    request = JobRequest(model, prompt, plain_choices(choices), loaded.notes, preview=preview)
    typer.echo(queue.open().submit(loaded.image, request, max_attempts=max_attempts).id)


@app.command("continue")
@with_queue_options
def continue_preview(job: JobArgument, *, queue: QueueOptions) -> None:
    """Queue the video of a finished preview, and print the name of its job; Stage I is not run again."""
    typer.echo(queue.open().continue_preview(job).id)


@app.command()
@with_queue_options
def batch(
    folder: Annotated[Path, typer.Argument(help="Pictures; the text of picture.txt is the prompt of picture.jpg.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the videos; made if it is missing.")],
    prompt: Annotated[str, typer.Option(help="Prompt of pictures without a text file.")] = "",
    model: ModelOption = "wan2.2",
    size: SizeOption = None,
    frames: FramesOption = None,
    seed: SeedOption = None,
    queue: QueueOptions,
) -> None:
    """Make a video of every picture in a folder, on all workers of the queue; a repeated call goes on where it was."""
    from swifti2v.runner.loading import settings_of

    opened = queue.open()  # says what to install, before the module below needs it
    from swifti2v.jobs.batch import Batch, pictures_in

    choices = {"size": size, "num_frames": frames, "seed": seed}
    settings_of(model, choices)
    work = Batch(opened, output, model=model, choices=choices)
    failures = work.run(pictures_in(folder, prompt=prompt), on_change=typer.echo)
    if failures:
        msg = f"{len(failures)} of the videos failed ({failures[0]}); see `swifti2v jobs show`, and run again"
        raise InvalidInputError(msg)


@app.command("list")
@with_queue_options
def list_jobs(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Jobs at most, the newest first.")] = 20,
    queue: QueueOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the jobs, the newest first."""
    opened = queue.open()
    jobs = opened.store.list(limit=limit)
    if as_json:
        typer.echo(json.dumps([_described(opened, job) for job in jobs]))
        return
    for job in jobs:
        prompt = " ".join(job.request.prompt.split())[:60]
        typer.echo(f"{job.id}  {job.state.value:<11} {job.progress.percent:>3}%  {job.request.model}  {prompt}")


@app.command()
@with_queue_options
def show(job: JobArgument, *, queue: QueueOptions) -> None:
    """Print everything about a job as JSON; `video` is the file of a finished one."""
    opened = queue.open()
    typer.echo(json.dumps(_described(opened, opened.store.get(job)), indent=2))


@app.command()
@with_queue_options
def cancel(
    job: JobArgument,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the job and its files too.")] = False,
    queue: QueueOptions,
) -> None:
    """Cancel a job; one at work stops within one denoising step."""
    opened = queue.open()
    known = opened.remove(job) if remove else opened.store.cancel(job)
    typer.echo(f"{known.id}: {'removed' if remove else known.state.value}")


@app.command()
@with_acceleration_options
@with_queue_options
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
    lease: LeaseOption = 30.0,
    grace: GraceOption = 0.0,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", hidden=True, help="Stop when standard input closes: for `serve`.")
    ] = False,
    preload: Annotated[bool, typer.Option(help="Load the first model before the first job.")] = True,
    queue: QueueOptions,
) -> None:
    """Work on the queue until stopped; SIGTERM or Ctrl-C gives the job at work back, to be continued by another."""
    opened = queue.open()  # says what to install, before the modules below need it
    from swifti2v.jobs.logs import log_as_json
    from swifti2v.jobs.state import ALL_STAGES, JobStage
    from swifti2v.jobs.worker import Worker, WorkerOptions

    log_as_json()
    stages = {"one": (JobStage.ONE,), "two": (JobStage.TWO,), "both": ALL_STAGES}[stage]
    runner = pipeline_runner(device, memory, accelerated_by.acceleration(), stages, few_step=not many_step)
    options = WorkerOptions(models=model or None, stages=stages, lease_seconds=lease, grace_seconds=grace)
    worker = Worker(opened.store, opened.files, runner, options=options)
    if model and preload:
        runner.pipeline(model[0])
    if stop_with_stdin:
        threading.Thread(target=_drain_at_end_of_input, args=(worker,), daemon=True).start()
    with _draining_on_signals(worker):
        worker.run(until_idle=until_idle)


@app.command()
@with_queue_options
def prune(
    *,
    max_age_hours: Annotated[float | None, typer.Option(min=0, help="Remove finished jobs older than this.")] = None,
    max_gigabytes: Annotated[float | None, typer.Option(min=0, help="Keep the newest up to so much.")] = None,
    queue: QueueOptions,
) -> None:
    """Remove old finished jobs, what is left of removed ones, and files without a job."""
    opened = queue.open()
    from swifti2v.jobs import retention

    pruned = retention.prune(opened, retention.RetentionPolicy.of(hours=max_age_hours, gigabytes=max_gigabytes))
    typer.echo(f"removed {pruned.num_jobs} jobs, {pruned.num_bytes / 1e6:.1f} MB")


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
    stages = stages or ALL_STAGES
    return PipelineRunner.on_device(device, memory, acceleration=acceleration, stages=stages, few_step=few_step)


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
    # Not through `sys.stdin`, whose lock this thread would still hold when the interpreter ends, which then aborts.
    while os.read(sys.stdin.fileno(), 4096):
        continue
    worker.drain()
