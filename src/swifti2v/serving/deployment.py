"""The service on Ray Serve, for several cards or machines. The only module that imports ray.

Deployments, over the same queue and the same folder as on one machine:

- `Ingress` is the HTTP application as it is, behind Ray's proxy.
- `ModelReplica` holds a pipeline on its card and works on the queue when it is called: the whole of it, or one stage.
- `Dispatcher`, one, keeps as many calls under way as there are jobs to do. Ray Serve scales the replicas by them.

With replicas of one stage there are the last two for each stage, scaled by the jobs that are to go on with it.

No job travels in a call: a replica claims it from the store, as a worker process does. So nothing is lost with a
process, whichever dies: the lease of its job runs out, the dispatcher sees that the job is not done, and another
replica goes on at the first unfinished segment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError

from swifti2v.errors import ConfigurationError, DeviceLostError, OutputError
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import ALL_STAGES
from swifti2v.jobs.worker import Worker, WorkerOptions
from swifti2v.serving.application import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from swifti2v.jobs.state import JobStage
    from swifti2v.serving.settings import ClusterSettings, ServiceSettings, WorkerGroup

LOGGER = logging.getLogger(__name__)

APPLICATION = "swifti2v"
JOBS_PER_CALL = 16
"""A replica takes several jobs in one call, because Ray's router may pause between two calls."""

_OBJECT_STORE_BYTES = 256 << 20  # pictures and videos travel through the data folder, not through Ray
_UPSCALE_SECONDS = 2.0  # that jobs must wait before another replica is started
_STOP_SECONDS = 60.0  # within which a replica makes a step and gives its job back


class ModelReplica:
    """A pipeline, of some stages or all, that works on the queue while it is called."""

    def __init__(
        self, settings: ServiceSettings, cluster: ClusterSettings, stages: Collection[JobStage] = ALL_STAGES
    ) -> None:
        self._models = [model.name for model in settings.models]
        self._queue = JobQueue.open(settings.data, url=settings.database_url)
        self._runner = PipelineRunner.on_device(
            cluster.worker_device,
            cluster.memory,
            acceleration=cluster.acceleration,
            stages=stages,
            few_step=cluster.few_step,
        )
        self._runner.pipeline(self._models[0])
        self._options = WorkerOptions(
            models=self._models,
            stages=stages,
            lease_seconds=cluster.lease_seconds,
            grace_seconds=cluster.grace_seconds,
        )
        self._lost: DeviceLostError | None = None

    def check_health(self) -> None:
        """Raise if the card has failed; Ray then starts another replica."""
        if self._lost is not None:
            raise self._lost

    async def work(self) -> int:
        """Work on jobs until there are none, but not for ever; return how many. Cancelling it gives the job back."""
        self.check_health()
        worker = Worker(self._queue.store, self._queue.files, self._runner, options=self._options)
        working = asyncio.create_task(asyncio.to_thread(worker.run, until_idle=True, max_jobs=JOBS_PER_CALL))
        try:
            return await asyncio.shield(working)
        except DeviceLostError as error:
            self._lost = error
            raise
        except asyncio.CancelledError:
            worker.drain()
            await asyncio.wait([working])  # or the next call would find the card in use
            raise


class Dispatcher:
    """Keeps as many calls of `work` under way as there are jobs, so that Ray Serve knows what is to be done.

    Args:
        replicas: handle of the `ModelReplica` deployment.
        settings: of the service.
        max_calls: under way at most; more than there can be replicas tells Ray nothing.
        stages: of the replicas.
        poll_seconds: pause between two looks at the queue.
    """

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        settings: ServiceSettings,
        *,
        max_calls: int,
        stages: Collection[JobStage] = ALL_STAGES,
        poll_seconds: float = 0.2,
    ) -> None:
        self._replicas = replicas
        self._store = JobQueue.open(settings.data, url=settings.database_url).store
        self._max_calls = max_calls
        self._stages = stages
        self._poll_seconds = poll_seconds
        self._calls: set[asyncio.Task[None]] = set()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def drain(self) -> None:
        """Start no more calls, and let the replicas give their current jobs back."""
        self._watching.cancel()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(self._watching, *self._calls, return_exceptions=True)

    def check_health(self) -> None:
        """Raise if the queue is not watched any more; Ray then starts another dispatcher."""
        if self._watching.done() and not self._watching.cancelled():
            msg = "the dispatcher has stopped"
            raise RuntimeError(msg)

    async def _watch(self) -> None:
        while True:
            missing = min(await asyncio.to_thread(self._num_active), self._max_calls) - len(self._calls)
            for _ in range(missing):
                call = asyncio.create_task(self._call())
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            await asyncio.sleep(self._poll_seconds)

    def _num_active(self) -> int:
        try:
            return self._store.num_active(self._stages)
        except OutputError as error:
            LOGGER.warning("the queue cannot be read: %s", error)
            return 0

    async def _call(self) -> None:
        response = self._replicas.work.remote()
        try:
            num_jobs = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayError as error:  # the replica died; its job shows as one that is to be done
            LOGGER.warning("a model replica is lost: %s", type(error).__name__)
            num_jobs = 0
        if not num_jobs:  # what is active is in other hands, or in those of a dead replica until its lease runs out
            await asyncio.sleep(1.0)


def application(settings: ServiceSettings, cluster: ClusterSettings) -> Any:
    """Return the Ray Serve application, to be given to `serve.run`."""
    beside: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "num_replicas": 1}
    dispatchers = [
        serve.deployment(Dispatcher, name=_dispatcher_name(group), **beside).bind(
            _replicas(settings, cluster, group), settings, max_calls=group.max_workers + 1, stages=group.stages
        )
        for group in cluster.groups
    ]
    return _ingress(settings, beside).bind(*dispatchers)


def _replicas(settings: ServiceSettings, cluster: ClusterSettings, group: WorkerGroup) -> Any:
    actor = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    scaling = {
        "min_replicas": cluster.min_workers,
        "max_replicas": group.max_workers,
        "target_ongoing_requests": 1,
        "upscale_delay_s": _UPSCALE_SECONDS,
        "downscale_delay_s": cluster.idle_seconds,
    }
    return serve.deployment(
        ModelReplica,
        name=f"{group.name}ModelReplica",
        ray_actor_options=actor,
        autoscaling_config=scaling,
        max_ongoing_requests=1,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=cluster.grace_seconds + _STOP_SECONDS,
    ).bind(settings, cluster, group.stages)


def _dispatcher_name(group: WorkerGroup) -> str:
    return f"{group.name}Dispatcher"


def run(settings: ServiceSettings, cluster: ClusterSettings, *, address: tuple[str, int]) -> None:
    """Serve at (host, port) until SIGTERM or SIGINT, then let the jobs at work be given back."""
    stopping = threading.Event()
    with _cluster(cluster):
        _start(settings, cluster, address)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: stopping.set())
        LOGGER.info("serving at http://%s:%d on Ray", *address)
        try:
            stopping.wait()
        finally:
            names = map(_dispatcher_name, cluster.groups)
            drained = [serve.get_deployment_handle(name, APPLICATION).drain.remote() for name in names]
            for response in drained:
                response.result(timeout_s=_STOP_SECONDS)
            serve.shutdown()


def _start(settings: ServiceSettings, cluster: ClusterSettings, address: tuple[str, int]) -> None:
    try:
        serve.start(http_options={"host": address[0], "port": address[1]})
        serve.run(application(settings, cluster), name=APPLICATION, route_prefix="/")
    except (RayError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = f"the service did not start on Ray ({reason}); see Ray's logs, and whether the cluster has room"
        raise ConfigurationError(msg) from error


def _ingress(settings: ServiceSettings, options: dict[str, Any]) -> Any:
    """Return the deployment of the HTTP application, built where it runs: a database connection cannot be pickled."""

    def build() -> FastAPI:
        return create_app(settings)

    build_app: Callable[[], Any] = build

    @serve.ingress(build_app)
    class Ingress:
        def __init__(self, *dispatchers: DeploymentHandle[Any]) -> None:
            self.dispatchers = dispatchers

    return serve.deployment(Ingress, name="Ingress", max_ongoing_requests=1000, **options)


@contextmanager
def _cluster(settings: ClusterSettings) -> Iterator[None]:
    """Hold a connection to a cluster, or a cluster of this machine alone."""
    needed = sum(group.max_workers for group in settings.groups) * settings.cpus_per_worker
    own: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, int(needed + 1)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(logging_level=logging.WARNING, **({"address": settings.address} if settings.address else own))
    except Exception as error:  # Ray raises just that when a node does not come up within 30 s
        msg = f"there is no Ray cluster at {settings.address!r}; start one with: ray start --head"
        if settings.address is None:
            msg = "no Ray cluster could be started on this machine; wait until it is less busy, or give --ray-address"
        raise ConfigurationError(msg, param="ray_address", value=settings.address) from error
    try:
        yield
    finally:
        ray.shutdown()
