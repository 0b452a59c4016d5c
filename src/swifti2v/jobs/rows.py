"""Jobs as rows of the table, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swifti2v.jobs.state import Job, JobFailure, JobProgress, JobRequest, JobResult, JobStage, JobState

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

_SAME = (
    *("id", "sequence", "owner", "claims", "max_attempts", "created_at", "started_at", "finished_at"),
    *("worker", "lease_token", "lease_expires_at"),
)
"""Columns that hold a field of `Job` unchanged."""


def row_of_request(request: JobRequest) -> dict[str, Any]:
    """Return the columns that say what is to be made."""
    kept = {"options": dict(request.options), "notes": request.notes, "keep_motion": request.keep_motion}
    columns = {"model": request.model, "prompt": request.prompt, "preview": request.preview}
    return columns | {"options": json.dumps(kept)}


def row_of_failure(now: float, failure: JobFailure) -> dict[str, Any]:
    """Return the columns of a job that failed at `now`."""
    return {"state": JobState.FAILED, "finished_at": now, "failure": as_json(failure)}


def as_json(value: JobProgress | JobResult | JobFailure) -> str:
    """Return a value as its column holds it."""
    return json.dumps(asdict(value))


def job_of_row(row: RowMapping) -> Job:
    """Return the job of a row."""
    asked, result, failure = (json.loads(row[name] or "null") for name in ("options", "result", "failure"))
    request = JobRequest(
        row["model"],
        row["prompt"],
        asked["options"],
        tuple(asked["notes"]),
        preview=row["preview"],
        keep_motion=asked.get("keep_motion", True),  # in queues of earlier versions every video was to be compared
    )
    return Job(
        **{name: row[name] for name in _SAME},
        state=JobState(row["state"]),
        request=request,
        progress=JobProgress(**json.loads(row["progress"])),
        attempts=row["claims"] - row["releases"],
        result=result and JobResult(**{**result, "notes": tuple(result["notes"])}),
        failure=failure and JobFailure(**failure),
        next_stage=JobStage(row["next_stage"]),
    )
