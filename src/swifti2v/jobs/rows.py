"""Jobs as rows of the table, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swifti2v.jobs.state import Job, JobFailure, JobProgress, JobRequest, JobResult, JobStage, JobState

if TYPE_CHECKING:
    from sqlalchemy import RowMapping


def row_of_request(request: JobRequest) -> dict[str, Any]:
    """Return the columns that say what is to be made."""
    return {
        "model": request.model,
        "prompt": request.prompt,
        "options": json.dumps(
            {"options": dict(request.options), "notes": request.notes, "keep_motion": request.keep_motion}
        ),
        "preview": request.preview,
    }


def row_of_failure(now: float, failure: JobFailure) -> dict[str, Any]:
    """Return the columns of a job that failed at `now`."""
    return {"state": JobState.FAILED, "finished_at": now, "failure": as_json(failure)}


def as_json(value: JobProgress | JobResult | JobFailure) -> str:
    """Return a value as its column holds it."""
    return json.dumps(asdict(value))


def job_of_row(row: RowMapping) -> Job:
    """Return the job of a row."""
    result, failure = row["result"], row["failure"]
    return Job(
        id=row["id"],
        sequence=row["sequence"],
        owner=row["owner"],
        state=JobState(row["state"]),
        request=_request(row),
        progress=JobProgress(**json.loads(row["progress"])),
        claims=row["claims"],
        attempts=row["claims"] - row["releases"],
        max_attempts=row["max_attempts"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        worker=row["worker"],
        lease_token=row["lease_token"],
        lease_expires_at=row["lease_expires_at"],
        result=None if result is None else _result(json.loads(result)),
        failure=None if failure is None else JobFailure(**json.loads(failure)),
        next_stage=JobStage(row["next_stage"]),
    )


def _request(row: RowMapping) -> JobRequest:
    kept = json.loads(row["options"])
    return JobRequest(
        row["model"],
        row["prompt"],
        kept["options"],
        tuple(kept["notes"]),
        preview=row["preview"],
        keep_motion=kept.get("keep_motion", True),  # in queues of earlier versions every video was to be compared
    )


def _result(values: dict[str, Any]) -> JobResult:
    return JobResult(**{**values, "notes": tuple(values["notes"])})
