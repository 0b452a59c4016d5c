"""The queue as its users see it: the command line, the HTTP service, the web app."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swifti2v.errors import JobError, WorkDirectoryError
from swifti2v.jobs.database import Database, sqlite_url
from swifti2v.jobs.files import JobFiles
from swifti2v.jobs.state import DEFAULT_MAX_ATTEMPTS, Job, JobRequest, JobStage, JobState, new_job_id
from swifti2v.jobs.store import DEFAULT_MAX_ACTIVE, JobStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import PIL.Image

    from swifti2v.jobs.files import AttemptFiles


@dataclass(frozen=True)
class JobQueue:
    """A queue: the store of its jobs and their files."""

    store: JobStore
    files: JobFiles

    @classmethod
    def open(cls, root: Path, *, url: str | None = None, max_active: int = DEFAULT_MAX_ACTIVE) -> JobQueue:
        """Open the queue of the data folder `root`, or make it.

        Args:
            root: of the files.
            url: of the database; default: SQLite in ``queue.db`` in `root`.
            max_active: jobs that wait or run at most.

        Raises:
            ConfigurationError: the URL cannot be used.
            OutputError: folder or database cannot be made or opened.
        """
        files = JobFiles(root)
        database = Database(url or sqlite_url(root / "queue.db"))
        return cls(JobStore(database, max_active=max_active), files)

    def submit(
        self,
        image: PIL.Image.Image,
        request: JobRequest,
        *,
        owner: str = "",
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        max_active_of_owner: int | None = None,
    ) -> Job:
        """Keep the picture (mode RGB) and queue the job.

        Raises:
            QueueFullError: as in `JobStore.submit`; nothing is kept then.
            OutputError: the picture cannot be written.
        """

        def submit(job_id: str) -> Job:
            self.files.add_input(job_id, image)
            return self.store.submit(
                job_id,
                request,
                owner=owner,
                max_attempts=max_attempts,
                max_active_of_owner=max_active_of_owner,
            )

        return self._new(submit)

    def continue_preview(self, job_id: str) -> Job:
        """Queue the whole video of a finished preview; it begins with the motion reference that is already there.

        Raises:
            JobError: there is no such job, it is no finished preview, or its files are gone.
            QueueFullError, OutputError: as in `submit`.
        """
        preview = self.store.get(job_id)
        if not preview.request.preview:
            msg = f"{job_id} is a video already; choose a preview, or make a new one"
            raise JobError(msg)
        if preview.state is not JobState.COMPLETED:
            msg = f"the preview {job_id} is not finished; wait for it, or make the video without a preview"
            raise JobError(msg)
        made = self.files.attempt(preview.id, preview.claims)

        def submit(new_id: str) -> Job:
            begun = self.files.begin_with(new_id, preview.id, made)
            return self.store.submit(
                new_id,
                replace(preview.request, preview=False, keep_motion=True),  # it was looked at: it will be compared
                owner=preview.owner,
                max_attempts=preview.max_attempts,
                next_stage=_first_stage(begun),
            )

        return self._new(submit)

    def result_files(self, job: Job) -> AttemptFiles | None:
        """Return the files of the claim that finished a job, or that is at work on it; None while it waits."""
        if job.claims == 0 or job.state not in (JobState.IN_PROGRESS, JobState.COMPLETED):
            return None
        return self.files.attempt(job.id, job.claims)

    def remove(self, job_id: str, *, owner: str | None = None) -> Job:
        """Cancel a job, hide it and remove its files: now, or when its worker has stopped, by the worker or `prune`.

        Raises:
            JobError: there is no such job (of this owner).
        """
        job = self.store.remove(job_id, owner=owner)
        if job.state is not JobState.CANCELLED or job.lease_token is None:
            self.files.remove(job_id)
            self.store.forget(job_id)
        return job

    def _new(self, submit: Callable[[str], Job]) -> Job:
        """Return the job that `submit` makes under a new name; remove its files if that fails."""
        job_id = new_job_id()
        try:
            return submit(job_id)
        except BaseException:
            self.files.remove(job_id)
            raise


def _first_stage(begun: AttemptFiles) -> JobStage:
    """Return the stage that a job starts with when it takes over the work of another."""
    from swifti2v.work_directory import WorkDirectory  # with torch, which most users of a queue do without

    try:
        # A preview of an earlier version has left no prompt for a worker of Stage II alone.
        return JobStage.TWO if WorkDirectory(begun.work).is_ready_for_stage_two else JobStage.ONE
    except WorkDirectoryError:  # it is damaged; the worker that finds this out begins anew
        return JobStage.ONE
