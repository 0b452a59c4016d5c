"""`swifti2v serve`: the HTTP service, with worker processes beside it."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.jobs import (
    DEFAULT_DATA,
    DataOption,
    GraceOption,
    LeaseOption,
    ManyStepOption,
    MemoryOption,
    QueueOptions,
    StageOption,
    need_packages,
    with_queue_options,
)
from swifti2v.cli.option_groups import with_option_group
from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.serving.settings import ClusterSettings, ServiceSettings

LOGGER = logging.getLogger(__name__)

KEY_FILE = "keys.json"

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its way of the future, without its warning
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs more than five seconds to start a process
}
"""Settings of Ray that it takes from nowhere else, where the user has not made them."""

PACKAGES = ("sqlalchemy", "fastapi", "prometheus_client", "uvicorn")

KeysOption = Annotated[Path | None, typer.Option(help="File of the API keys; default: keys.json in the data folder.")]
NameArgument = Annotated[str, typer.Argument(help="Who holds the key; a key sees the videos of its name only.")]


@dataclass(frozen=True)
class HttpOptions:
    """Where the service listens, whom it serves and what it takes."""

    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000
    root_path: Annotated[str, typer.Option(help="Path below which a proxy offers the service: /video.")] = ""
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may call the service, https://example.org, or *; default: none."),
    ] = None
    keys: KeysOption = None
    without_keys: Annotated[bool, typer.Option("--open", help="Serve without keys, to everybody.")] = False
    max_jobs: Annotated[int, typer.Option(min=1, help="Videos that may wait or run.")] = 1000
    max_upload_mebibytes: Annotated[float, typer.Option(min=0.01, help="Limit of a request's body.")] = 32.0
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="Host from which pictures may be fetched by https; default: none.")
    ] = None
    keep_hours: Annotated[float, typer.Option(min=0, help="Remove finished videos after so long.")] = 168.0
    keep_gigabytes: Annotated[float | None, typer.Option(min=0, help="Keep the newest up to so much.")] = None

    def settings(self, models: list[str], queue: QueueOptions, *, few_step: bool) -> ServiceSettings:
        """Return the settings of the service; raise `InvalidInputError` if others could use it without a key."""
        from swifti2v.jobs.retention import RetentionPolicy
        from swifti2v.runner.loading import settings_of
        from swifti2v.serving.settings import ServedModel, ServiceLimits, ServiceSettings

        limits = ServiceLimits(
            max_upload_bytes=int(self.max_upload_mebibytes * (1 << 20)),
            max_active_jobs=self.max_jobs,
            image_hosts=tuple(self.allow_image_host or ()),
        )
        return ServiceSettings(
            data=queue.data,
            models=tuple(ServedModel(name, settings_of(name, few_step=few_step)) for name in models),
            database_url=queue.database,
            keys=None if self.without_keys else self._key_file(queue.data),
            allowed_origins=tuple(self.allow_origin or ()),
            root_path=self.root_path.rstrip("/"),
            limits=limits,
            retention=RetentionPolicy.of(hours=self.keep_hours, gigabytes=self.keep_gigabytes),
        )

    def _key_file(self, data: Path) -> Path:
        """Return the file of keys, which may be missing only where nobody else can reach the service."""
        path = self.keys or data / KEY_FILE
        if not path.exists():
            if not is_loopback(self.host):
                msg = f"others can reach {self.host}, and {path} holds no keys; run: swifti2v serve add-key NAME"
                raise InvalidInputError(msg, param="host", value=self.host)
            LOGGER.warning(
                "there are no keys: until one is added, who reaches this machine's loopback may do everything"
            )
        return path


@dataclass(frozen=True)
class ClusterOptions:
    """How the service spreads over Ray."""

    on_ray: Annotated[bool, typer.Option("--ray", help="Spread over a Ray cluster.")] = False
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a running cluster; default: one of this machine alone.")
    ] = None
    min_workers: Annotated[int, typer.Option(min=0, help="With --ray: workers that stay when nothing waits.")] = 1
    stage_one_workers: Annotated[
        int, typer.Option(min=0, help="With --ray: workers at most that do Stage I alone, instead of --workers.")
    ] = 0
    stage_two_workers: Annotated[
        int, typer.Option(min=0, help="With --ray: workers at most that do Stage II alone, instead of --workers.")
    ] = 0
    idle: Annotated[float, typer.Option(min=0, help="With --ray: seconds before a worker too many ends.")] = 120.0
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="With --ray: cards for each worker.")] = 0.0

    def check(self, stage: str, workers: int | None) -> None:
        """Raise `InvalidInputError` for options that would have no effect."""
        of_one_stage = self.stage_one_workers + self.stage_two_workers
        if of_one_stage and not self.on_ray:
            msg = "--stage-one-workers and --stage-two-workers are for --ray; without it, give each worker its --stage"
            raise InvalidInputError(msg, param="stage_one_workers", value=of_one_stage)
        if self.on_ray and stage != "both":
            msg = f"--stage {stage} is not for --ray; give --stage-one-workers or --stage-two-workers"
            raise InvalidInputError(msg, param="stage", value=stage)
        if of_one_stage and workers is not None:
            msg = "--workers do both stages; leave it out beside workers of one stage"
            raise InvalidInputError(msg, param="workers", value=workers)

    def settings(self, workers: int, **of_workers: object) -> ClusterSettings:
        """Return the settings of the cluster; raise `InvalidInputError` if fewer workers may be than stay."""
        from swifti2v.serving.settings import ClusterSettings

        cluster = ClusterSettings(
            address=self.ray_address,
            min_workers=self.min_workers,
            max_workers=workers,
            stage_one_workers=self.stage_one_workers,
            stage_two_workers=self.stage_two_workers,
            gpus_per_worker=self.gpus_per_worker,
            idle_seconds=self.idle,
            **of_workers,  # type: ignore[arg-type]  # of the fields that are left
        )
        most = min(group.max_workers for group in cluster.groups)
        if most < max(self.min_workers, 1):
            msg = f"{most} workers are allowed and {self.min_workers} are to stay; allow at least one, and none fewer"
            raise InvalidInputError(msg, param="min_workers", value=self.min_workers)
        return cluster


app = typer.Typer(help="Serve /v1/videos over HTTP; keys of its users.", invoke_without_command=True)


@app.callback()
@partial(with_option_group, parameter="http", group=HttpOptions)
@with_acceleration_options
@partial(with_option_group, parameter="on", group=ClusterOptions)
@with_queue_options
def serve(  # noqa: PLR0913 - typer makes an option of each parameter
    context: typer.Context,
    *,
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint to serve; may be given several times.")] = None,
    http: HttpOptions,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes (with --ray: at most); 0 if elsewhere. [default: 1]")
    ] = None,
    stage: StageOption = "both",
    device: Annotated[str | None, typer.Option(help="Device of the workers: cpu, cuda, cuda:1, ...")] = None,
    memory: MemoryOption = None,
    many_step: ManyStepOption = False,
    accelerated_by: AccelerationOptions,
    grace: GraceOption = 0.0,
    lease: LeaseOption = 30.0,
    on: ClusterOptions,
    queue: QueueOptions,
) -> None:
    """Serve until stopped; SIGTERM or Ctrl-C drains: jobs at work are given back, to be continued."""
    if context.invoked_subcommand is not None:
        return
    need_packages(*PACKAGES, extra="serve")
    on.check(stage, workers)
    from swifti2v.cli.generate import quiet_libraries
    from swifti2v.jobs.logs import log_as_json

    log_as_json()
    quiet_libraries()
    workers = 1 if workers is None else workers
    acceleration = accelerated_by.acceleration()
    models = model or ["wan2.2"]
    settings = http.settings(models, queue, few_step=not many_step)
    if on.on_ray:
        cluster = on.settings(
            workers,
            device=device,
            memory=memory,
            acceleration=acceleration,
            few_step=not many_step,
            lease_seconds=lease,
            grace_seconds=grace,
        )
        _run_on_ray(settings, (http.host, http.port), cluster)
        return
    if workers:
        _check_worker(device, accelerated_by.decode_device, memory)
    workplace = {"stage": stage, "device": device, "memory": memory, "data": queue.data, "database": queue.database}
    options = {**workplace, "lease": lease, "grace": grace}
    command = _worker_command(models, options, accelerated_by, many_step=many_step)
    _run(settings, (http.host, http.port), command=command, num_workers=workers, stop_seconds=grace + 60)


@app.command("add-key")
def add_key(
    name: NameArgument,
    *,
    max_active_jobs: Annotated[int, typer.Option(min=1, help="Videos that may wait or run at once.")] = 100,
    requests_per_minute: Annotated[int, typer.Option(min=1, help="Requests of any kind in a minute.")] = 600,
    keys: KeysOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Make an API key and print it; only its hash is kept. A running service asks for it at once."""
    need_packages(*PACKAGES, extra="serve")
    from swifti2v.serving import keys as key_files

    path = keys or data / KEY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = {"max_active_jobs": max_active_jobs, "requests_per_minute": requests_per_minute}
    typer.echo(key_files.add_key(path, name, **limits))


@app.command("remove-key")
def remove_key(name: NameArgument, *, keys: KeysOption = None, data: DataOption = DEFAULT_DATA) -> None:
    """Take a key away; a running service forgets it at once."""
    need_packages(*PACKAGES, extra="serve")
    from swifti2v.serving import keys as key_files

    key_files.remove_key(keys or data / KEY_FILE, name)
    typer.echo(f"{name}: removed")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run_on_ray(settings: ServiceSettings, address: tuple[str, int], cluster: ClusterSettings) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    need_packages("ray", extra="serve,ray")
    from swifti2v.serving import deployment

    # The processes of a cluster run in folders of their own.
    settings = replace(settings, data=settings.data.resolve(), keys=settings.keys and settings.keys.resolve())
    deployment.run(settings, cluster, address=address)


def _check_worker(device: str | None, decode_device: str | None, memory: str | None) -> None:
    """Raise `InvalidInputError` for options with which every worker would end, and be started again, for ever."""
    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.runner.loading import open_device

    open_device(device)
    if decode_device is not None:
        open_device(decode_device)
    if memory is not None:
        MemoryLimits.parse(memory)


def _worker_command(
    models: list[str], options: Mapping[str, object], accelerated_by: AccelerationOptions, *, many_step: bool
) -> list[str]:
    """Return the command line of a worker; options that are None are left to its defaults."""
    program = "from swifti2v.cli.main import main; main()"
    flags = {"stop_with_stdin": True, "compile": accelerated_by.compile_blocks, "many_step": many_step}
    given = {**options, **vars(accelerated_by), "compile_blocks": None}
    pairs = [*(("model", name) for name in models), *given.items()]
    command = [sys.executable, "-c", program, "jobs", "work"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in pairs if value is not None]
    return command + [f"--{name.replace('_', '-')}" for name, is_given in flags.items() if is_given]


def _run(
    settings: ServiceSettings, address: tuple[str, int], *, command: list[str], num_workers: int, stop_seconds: float
) -> None:
    import threading

    from swifti2v.serving.application import create_app
    from swifti2v.serving.server import server_for
    from swifti2v.serving.workers import WorkerProcesses

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
