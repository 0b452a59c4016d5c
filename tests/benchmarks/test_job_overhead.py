"""What a job adds: time is charged to the innermost part, and every part of a job is met."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.job_overhead import PIPELINE, Account, added, one_job, served
from swifti2v.geometry import Size
from swifti2v.jobs.queue import JobQueue
from swifti2v.pipelines.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    return now


def test_the_innermost_part_is_charged(clock: list[float]) -> None:
    account = Account()

    def pieces() -> Iterator[int]:
        for number in range(2):
            clock[0] += 10.0
            with account.during("progress"):
                clock[0] += 1.0
            yield number

    with account.during("rest"):
        clock[0] += 0.25
        for _ in account.iterated(pieces)():  # type: ignore[arg-type]  # what it yields does not matter
            clock[0] += 100.0
        with account.during("files"):
            clock[0] += 3.0
    assert account.seconds == {"rest": 200.25, PIPELINE: 20.0, "progress": 2.0, "files": 3.0}
    assert added(account.seconds) == 205.25


def test_every_part_of_a_job_is_met(tmp_path: Path) -> None:
    pipeline = TwoStagePipeline.from_pretrained("mini", device="cpu")
    queue = JobQueue.open(tmp_path)
    before = vars(JobQueue)["submit"]
    seconds = one_job(queue, pipeline, {"size": Size(64, 32), "num_frames": 9, "seed": 1})
    parts = {"submit", "claim", "files", "complete", "progress", "pictures", "rest", PIPELINE}
    assert set(seconds) == parts | {"process"}
    assert all(value > 0 for value in seconds.values())
    assert added(seconds) < sum(seconds[part] for part in parts) < 1.1 * seconds["process"]
    assert vars(JobQueue)["submit"] is before, "nothing stays wrapped"
    queue.store.database.close()


def test_the_service_is_asked() -> None:
    found = served("64x32x9", 1)
    assert found["create"] > found["ask"] > 0
