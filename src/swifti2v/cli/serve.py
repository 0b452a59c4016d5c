"""`swifti2v serve`: the HTTP service, with worker processes beside it."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.jobs import (
    DEFAULT_DATA,
    DatabaseOption,
    DataOption,
    ManyStepOption,
    MemoryOption,
    StageOption,
)
from swifti2v.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.runner.acceleration import Acceleration
    from swifti2v.serving.settings import ClusterSettings, ServiceSettings

KEY_FILE = "keys.json"

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its way of the future, without its warning
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than five seconds to start a process
}
"""Settings of Ray that it takes from nowhere else, where the user has not made them."""

KeysOption = Annotated[Path | None, typer.Option(help="File of the API keys; default: keys.json in the data folder.")]
NameArgument = Annotated[str, typer.Argument(help="Who holds the key; a key sees the videos of its name only.")]

app = typer.Typer(help="Serve /v1/videos over HTTP; keys of its users.", invoke_without_command=True)


@app.callback()
@with_acceleration_options
def serve(  # noqa: PLR0913 - typer makes an option of each parameter
    context: typer.Context,
    *,
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint to serve; may be given several times.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes (with --ray: at most); 0 if elsewhere. [default: 1]")
    ] = None,
    stage: StageOption = "both",
    device: Annotated[str | None, typer.Option(help="Of the workers: cpu, cuda, cuda:1, ...")] = None,
    memory: MemoryOption = None,
    many_step: ManyStepOption = False,
    accelerated_by: AccelerationOptions,
    keys: KeysOption = None,
    without_keys: Annotated[bool, typer.Option("--open", help="Serve without keys, to everybody.")] = False,
    max_jobs: Annotated[int, typer.Option(min=1, help="Videos that may wait or run.")] = 1000,
    max_upload_mebibytes: Annotated[float, typer.Option(min=0.01, help="Of a request's body.")] = 32.0,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="Host from which pictures may be fetched by https; default: none.")
    ] = None,
    keep_hours: Annotated[float, typer.Option(min=0, help="Remove finished videos after so long.")] = 168.0,
    keep_gigabytes: Annotated[float | None, typer.Option(min=0, help="Keep the newest up to so much.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that a video may still run after SIGTERM.")] = 0.0,
    lease: Annotated[float, typer.Option(min=0.5, help="Seconds after which a silent worker counts as dead.")] = 30.0,
    on_ray: Annotated[bool, typer.Option("--ray", help="Spread over a Ray cluster.")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Of a running cluster; default: this machine alone.")] = None,
    min_workers: Annotated[int, typer.Option(min=0, help="With --ray: workers that stay when nothing waits.")] = 1,
    stage_one_workers: Annotated[
        int, typer.Option(min=0, help="With --ray: workers at most that do Stage I alone, instead of --workers.")
    ] = 0,
    stage_two_workers: Annotated[
        int, typer.Option(min=0, help="With --ray: workers at most that do Stage II alone, instead of --workers.")
    ] = 0,
    idle: Annotated[float, typer.Option(min=0, help="With --ray: seconds before a worker too many ends.")] = 120.0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="With --ray: cards for each worker.")] = 0.0,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Serve until stopped; SIGTERM or Ctrl-C drains: jobs at work are given back, to be continued."""
    if context.invoked_subcommand is not None:
        return
    _check_packages()
    _check_stages(stage, workers, stage_one_workers + stage_two_workers, on_ray=on_ray)
    from swifti2v.jobs.retention import RetentionPolicy
    from swifti2v.serving.settings import ClusterSettings, ServiceLimits, ServiceSettings

    workers = 1 if workers is None else workers
    acceleration = accelerated_by.acceleration()
    models = model or ["wan2.2"]
    settings = ServiceSettings(
        data=data,
        models=_served_models(models, few_step=not many_step),
        database_url=database,
        keys=_key_file(keys or data / KEY_FILE, host=host, without_keys=without_keys),
        limits=ServiceLimits(
            max_upload_bytes=int(max_upload_mebibytes * (1 << 20)),
            max_active_jobs=max_jobs,
            image_hosts=tuple(allow_image_host or ()),
        ),
        retention=RetentionPolicy(keep_hours * 3600, None if keep_gigabytes is None else int(keep_gigabytes * 1e9)),
    )
    if on_ray:
        cluster = ClusterSettings(
            address=ray_address,
            min_workers=min_workers,
            max_workers=workers,
            stage_one_workers=stage_one_workers,
            stage_two_workers=stage_two_workers,
            gpus_per_worker=gpus_per_worker,
            device=device,
            memory=memory,
            acceleration=acceleration,
            few_step=not many_step,
            lease_seconds=lease,
            grace_seconds=grace,
            idle_seconds=idle,
        )
        _run_on_ray(settings, (host, port), cluster)
        return
    if workers:
        _check_worker(device, accelerated_by.decode_device, memory)
    options = {"data": data, "database": database, "lease": lease, "grace": grace, "device": device, "memory": memory}
    command = _worker_command(models, options | {"stage": stage}, acceleration, many_step=many_step)
    _run(settings, (host, port), command=command, num_workers=workers, stop_seconds=grace + 60)


@app.command("add-key")
def add_key(
    name: NameArgument,
    *,
    max_active_jobs: Annotated[int, typer.Option(min=1, help="Videos that may wait or run at once.")] = 100,
    requests_per_minute: Annotated[int, typer.Option(min=1, help="Of any kind.")] = 600,
    keys: KeysOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Make an API key and print it; only its hash is kept."""
    _check_packages()
    from swifti2v.serving import keys as key_files

    path = keys or data / KEY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = {"max_active_jobs": max_active_jobs, "requests_per_minute": requests_per_minute}
    typer.echo(key_files.add_key(path, name, **limits))


@app.command("remove-key")
def remove_key(name: NameArgument, *, keys: KeysOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Take a key away; a running service forgets it at once."""
    _check_packages()
    from swifti2v.serving import keys as key_files

    key_files.remove_key(keys or data / KEY_FILE, name)
    typer.echo(f"{name}: removed")


def _run_on_ray(settings: ServiceSettings, address: tuple[str, int], cluster: ClusterSettings) -> None:
    least, most = cluster.min_workers, min(group.max_workers for group in cluster.groups)
    if most < max(least, 1):
        msg = (
            f"{most} workers are allowed and --min-workers is {least}; allow at least one worker, none fewer than stay"
        )
        raise InvalidInputError(msg)
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from swifti2v.serving import deployment
    except ModuleNotFoundError as error:
        msg = f"--ray needs {error.name}; install it with: pip install 'swifti2v[serve,ray]'"
        raise ConfigurationError(msg) from error
    from swifti2v.serving.server import log_as_json

    log_as_json()
    # The processes of a cluster run in folders of their own.
    settings = replace(settings, data=settings.data.resolve(), keys=settings.keys and settings.keys.resolve())
    deployment.run(settings, cluster, address=address)


def _check_stages(stage: str, workers: int | None, num_of_one_stage: int, *, on_ray: bool) -> None:
    """Refuse options that would have no effect."""
    if num_of_one_stage and not on_ray:
        msg = "--stage-one-workers and --stage-two-workers are for --ray; without it, give --stage, a card at a time"
        raise InvalidInputError(msg)
    if on_ray and stage != "both":
        msg = f"--stage {stage} is for workers without --ray; with it, give --stage-one-workers or --stage-two-workers"
        raise InvalidInputError(msg)
    if num_of_one_stage and workers is not None:
        raise InvalidInputError("--workers do both stages; leave it out beside workers of one stage")


def _check_packages() -> None:
    try:
        import fastapi  # noqa: F401 - whether it is there
        import prometheus_client  # noqa: F401 - the same
        import sqlalchemy  # noqa: F401 - the same
        import uvicorn  # noqa: F401 - the same
    except ModuleNotFoundError as error:
        msg = f"the service needs {error.name}; install it with: pip install 'swifti2v[serve]'"
        raise ConfigurationError(msg) from error


def _check_worker(device: str | None, decode_device: str | None, memory: str | None) -> None:
    """Raise `InvalidInputError` for options with which every worker would end, and be started again, for ever."""
    from swifti2v.runner.fitting import MemoryLimits
    from swifti2v.runner.loading import open_device

    open_device(device)
    if decode_device is not None:
        open_device(decode_device)
    if memory is not None:
        MemoryLimits.parse(memory)


def _served_models(names: list[str], *, few_step: bool) -> Any:
    from swifti2v.runner.loading import settings_of
    from swifti2v.serving.settings import ServedModel

    return tuple(ServedModel(name, settings_of(name, few_step=few_step)) for name in names)


def _key_file(path: Path, *, host: str, without_keys: bool) -> Path | None:
    """Return the file of keys; none only where nobody else can reach the service, or where that is wished."""
    if without_keys:
        return None
    if path.exists():
        return path
    if _is_loopback(host):
        typer.echo("note: no keys; who reaches this machine's loopback may do everything", err=True)
        return None
    msg = f"{path} holds no keys, and {host} can be reached by others; make one with: swifti2v serve add-key NAME"
    raise InvalidInputError(msg)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _worker_command(
    models: list[str], options: Mapping[str, object], acceleration: Acceleration, *, many_step: bool
) -> list[str]:
    """Return the command line of a worker; options that are None are left to its defaults."""
    program = "from swifti2v.cli.main import main; main()"
    given = {
        **options,
        "attention": acceleration.attention,
        "quantization": acceleration.quantization,
        "decoder": acceleration.decoder,
        "decoder-weights": acceleration.decoder_weights,
        "decode-device": acceleration.decode_device,
    }
    pairs = [("model", name) for name in models] + [(name, value) for name, value in given.items() if value is not None]
    arguments = [argument for name, value in pairs for argument in (f"--{name}", str(value))]
    flags = {"--compile": acceleration.compile_blocks, "--many-step": many_step}
    given_flags = [name for name, is_given in flags.items() if is_given]
    return [sys.executable, "-c", program, "jobs", "work", "--stop-with-stdin", *arguments, *given_flags]


def _run(
    settings: ServiceSettings, address: tuple[str, int], *, command: list[str], num_workers: int, stop_seconds: float
) -> None:
    import threading

    from swifti2v.serving.application import create_app
    from swifti2v.serving.server import log_as_json, server_for
    from swifti2v.serving.workers import WorkerProcesses

    log_as_json()
    draining = threading.Event()
    app = create_app(settings, draining=draining)
    server = server_for(app, address, limits=settings.limits, draining=draining)
    processes = WorkerProcesses(command, num_workers)
    # The server raises the signal again when it has shut down, and the workers have still to be ended then.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    processes.start()
    try:
        server.run()
    finally:
        processes.stop(grace_seconds=stop_seconds)
