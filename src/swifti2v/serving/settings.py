"""Settings of the service."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swifti2v.jobs.retention import RetentionPolicy
from swifti2v.jobs.state import ALL_STAGES, JobStage

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runner.acceleration import Acceleration
    from swifti2v.settings import GenerationSettings


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint that requests may name, and the settings that it recommends."""

    name: str
    defaults: GenerationSettings


@dataclass(frozen=True)
class ServiceLimits:
    """What a request may ask for.

    Args:
        max_upload_bytes: of a request's body.
        upload_seconds: in which a body must have arrived.
        max_image_pixels: of an input picture; judged from its header.
        max_video_pixels: of one frame.
        max_num_frames: of a video.
        max_active_jobs: that wait or run, of all keys together.
        concurrent_decodes: pictures decoded at once, each in a process of its own; memory is bounded by this times
            `max_image_pixels`.
        decode_seconds: of computing that decoding a picture may take.
        image_hosts: hosts (``host``, or ``host:port``) from which a picture may be fetched over https; none by default.
        max_connections: open at once; beyond them requests are answered with 503.
        header_seconds: in which a connection must have sent a request's head.
    """

    max_upload_bytes: int = 32 << 20
    upload_seconds: float = 60.0
    max_image_pixels: int = 50_000_000
    max_video_pixels: int = 4096 * 2176
    max_num_frames: int = 1281
    max_active_jobs: int = 1000
    concurrent_decodes: int = 2
    decode_seconds: float = 10.0
    image_hosts: tuple[str, ...] = ()
    max_connections: int = 2000
    header_seconds: float = 15.0


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one service.

    Args:
        data: folder of the queue and its files.
        models: that requests may name; the first is the default.
        database_url: of the queue; default: SQLite in `data`.
        keys: file of the API keys, see `Access`; None: everybody may do everything, and sees every job.
        allowed_origins: of web pages that may call the service (CORS), ``https://example.org``; ``*`` for all.
        root_path: path below which a proxy offers the service, ``/video``.
        limits: see `ServiceLimits`.
        retention: what is kept of finished jobs.
        prune_seconds: pause between two looks at it.
        poll_seconds: pause between two looks at a job that a client follows.
    """

    data: Path
    models: tuple[ServedModel, ...]
    database_url: str | None = None
    keys: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    prune_seconds: float = 60.0
    poll_seconds: float = 0.2


@dataclass(frozen=True)
class WorkerGroup:
    """Workers of a cluster that do the same stages, scaled by the number of jobs waiting for these stages.

    Args:
        name: begins the names of its deployments; empty where the workers do both stages.
        stages: that the workers do, and whose networks they hold.
        max_workers: at most.
    """

    name: str
    stages: tuple[JobStage, ...]
    max_workers: int


@dataclass(frozen=True)
class ClusterSettings:
    """How the service spreads over a Ray cluster.

    Args:
        address: of a running cluster (``auto``: the one of this machine); None: one is started, of this machine alone.
        min_workers, max_workers: model replicas while nothing waits, and at most.
        stage_one_workers, stage_two_workers: replicas at most that hold one stage alone; with any of these there are
            none that hold both, and `min_workers` of each stage stay.
        gpus_per_worker, cpus_per_worker: what Ray sets aside for a replica.
        device: of a replica; default: ``cuda`` with cards, else ``cpu``.
        memory: of the device that a run may take, as `MemoryLimits.parse` reads it; None: all is kept on the device.
        acceleration, few_step: of a replica, as in `TwoStagePipeline.from_pretrained`.
        lease_seconds: after which a silent replica counts as dead.
        grace_seconds: that a job may still run when the service stops.
        idle_seconds: after which a replica too many is ended.
    """

    address: str | None = None
    min_workers: int = 1
    max_workers: int = 1
    stage_one_workers: int = 0
    stage_two_workers: int = 0
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    device: str | None = None
    memory: str | None = None
    acceleration: Acceleration | None = None
    few_step: bool = True
    lease_seconds: float = 30.0
    grace_seconds: float = 0.0
    idle_seconds: float = 120.0

    @property
    def worker_device(self) -> str:
        """Device of a replica."""
        return self.device or ("cuda" if self.gpus_per_worker else "cpu")

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """The replicas by what they do."""
        alone = (
            WorkerGroup("StageOne", (JobStage.ONE,), self.stage_one_workers),
            WorkerGroup("StageTwo", (JobStage.TWO,), self.stage_two_workers),
        )
        return tuple(group for group in alone if group.max_workers) or (WorkerGroup("", ALL_STAGES, self.max_workers),)
