"""How long finished jobs are kept, and how many bytes of them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.state import Job

LOGGER = logging.getLogger(__name__)

ORPHAN_SECONDS = 3600.0
"""Age at which files without a record are removed; younger ones may belong to a job that is being submitted."""


@dataclass(frozen=True)
class RetentionPolicy:
    """How much is kept.

    Args:
        max_age_seconds: finished jobs older than this go; None for no limit.
        max_bytes: of the files of finished jobs; beyond it the oldest go; None for no limit.
    """

    max_age_seconds: float | None = 7 * 24 * 3600.0
    max_bytes: int | None = None

    @classmethod
    def of(cls, *, hours: float | None, gigabytes: float | None) -> RetentionPolicy:
        """Return the policy in the units of the command line: hours, and gigabytes of 10**9 bytes."""
        return cls(None if hours is None else hours * 3600, None if gigabytes is None else int(gigabytes * 1e9))


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed."""

    num_jobs: int
    num_bytes: int


def prune(queue: JobQueue, policy: RetentionPolicy, *, now: float | None = None) -> Pruned:
    """Remove finished jobs that the policy does not keep, those that were deleted, and files without a job.

    Jobs that wait, run, or whose worker has not stopped yet are never touched.

    Args:
        queue: to be pruned.
        policy: what is kept.
        now: seconds since 1970; default: this moment.
    """
    moment = time.time() if now is None else now
    removed = 0
    num_bytes = 0
    for job in _to_go(queue, policy, moment):
        num_bytes += queue.files.size_bytes(job.id)
        queue.files.remove(job.id)
        removed += queue.store.forget(job.id)
    for job_id in _orphans(queue, moment):
        num_bytes += queue.files.size_bytes(job_id)
        queue.files.remove(job_id)
    if removed:
        LOGGER.info("removed %d jobs, %d bytes", removed, num_bytes)
    return Pruned(removed, num_bytes)


def _to_go(queue: JobQueue, policy: RetentionPolicy, now: float) -> Iterator[Job]:
    deleted = queue.store.removed_ids()
    kept: list[Job] = []
    for job in queue.store.finished():
        too_old = policy.max_age_seconds is not None and now - (job.finished_at or 0.0) > policy.max_age_seconds
        if job.id in deleted or too_old:
            yield job
        else:
            kept.append(job)
    if policy.max_bytes is None:
        return
    sizes = [queue.files.size_bytes(job.id) for job in kept]
    excess = sum(sizes) - policy.max_bytes
    for job, size in zip(kept, sizes, strict=True):  # the oldest first
        if excess <= 0:
            return
        excess -= size
        yield job


def _orphans(queue: JobQueue, now: float) -> Iterator[str]:
    for job_id in queue.files.ids():
        try:
            age_seconds = now - queue.files.directory(job_id).stat().st_mtime
        except OSError:
            continue
        if age_seconds > ORPHAN_SECONDS and not queue.store.known(job_id):
            yield job_id
