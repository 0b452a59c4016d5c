"""`swifti2v app`: the web app, with one worker in the same process."""

from __future__ import annotations

import ipaddress
import os
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.jobs import (
    DEFAULT_DATA,
    ManyStepOption,
    MemoryOption,
    log_to_stderr,
    pipeline_runner,
)
from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.runner import PipelineRunner
    from swifti2v.memory.networks import PipelineNetworks

_STOP_SECONDS = 30.0
_CLOSE_SECONDS = 2
_LOOPBACK_NAMES = ("localhost", "127.0.0.1")


@with_acceleration_options
def app(  # noqa: PLR0913 - typer makes an option of each parameter
    *,
    model: Annotated[str, typer.Option(help="Checkpoint: a name (wan2.2, mini), a folder or a repository.")] = "wan2.2",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    device: Annotated[str | None, typer.Option(help="Of the worker: cpu, cuda, cuda:1, ...")] = None,
    memory: MemoryOption = None,
    many_step: ManyStepOption = False,
    accelerated_by: AccelerationOptions,
    worker: Annotated[bool, typer.Option(help="Work on the queue here; without, `swifti2v jobs work` must.")] = True,
    data_dir: Annotated[
        Path, typer.Option("--data", "--data-dir", envvar="SWIFTI2V_DATA", help="Data folder: the queue and its files.")
    ] = DEFAULT_DATA,
) -> None:
    """Open the web app on this machine: preview the motion, make the video, watch it grow; Ctrl-C stops it."""
    _prepare_gradio()
    import uvicorn

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.webapp.application import build_application
    from swifti2v.webapp.studio import Studio

    acceleration = accelerated_by.acceleration()
    log_to_stderr()
    runner = pipeline_runner(device, memory, acceleration, few_step=not many_step) if worker else None
    queue = JobQueue.open(data_dir)
    studio = Studio(queue, model, dimensions=_dimensions(model), few_step=not many_step)
    if not is_loopback(host):
        typer.echo(f"note: whoever reaches {host}:{port} may use the app and see everything in it", err=True)
    application = build_application(studio, hosts=_LOOPBACK_NAMES if is_loopback(host) else ())
    typer.echo(f"SwiftI2V runs at http://{'localhost' if is_loopback(host) else host}:{port}")
    # Open pages hold a connection each, for which the end must not wait.
    configuration = uvicorn.Config(
        application, host=host, port=port, log_level="warning", timeout_graceful_shutdown=_CLOSE_SECONDS
    )
    server = uvicorn.Server(configuration)
    with nullcontext() if runner is None else _working(queue, model, runner):
        server.run()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _working(queue: JobQueue, model: str, runner: PipelineRunner) -> Iterator[None]:
    """Keep a worker in a thread; at the end it gives back the job at work, which goes on at the next start."""
    from swifti2v.jobs.worker import Worker, WorkerOptions

    worker = Worker(queue.store, queue.files, runner, options=WorkerOptions(models=(model,)))
    thread = threading.Thread(target=worker.run, name="worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.drain()
        thread.join(_STOP_SECONDS)


def _dimensions(model: str) -> PipelineNetworks | None:
    """Return the networks for the plan, as far as they can be known without a download."""
    from swifti2v.memory.models import planned_model

    try:
        return planned_model(model).networks
    except (InvalidInputError, CheckpointError):
        return None  # the app then says that it has no plan; a model that cannot be read fails where it is opened


def _prepare_gradio() -> None:
    """Check that the packages are there, and turn off what Gradio would report to its makers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401 - whether it is there
        import sqlalchemy  # noqa: F401 - the same
    except ModuleNotFoundError as error:
        msg = f"the app needs {error.name}; install it with: pip install 'swifti2v[app]'"
        raise ConfigurationError(msg) from error
