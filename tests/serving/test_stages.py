"""What a client sees of a video whose stages are made by two workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import JobProgress, JobStage
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from swifti2v.runner.two_stage import TwoStagePipeline
from tests.serving.conftest import create, queue_of

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from starlette.testclient import TestClient


class Asking(PipelineRunner):
    """Asks the service for the video after every report."""

    def __init__(self, root: Path, stage: Any, client: TestClient, seen: list[dict[str, Any]]) -> None:
        super().__init__(lambda _name: TwoStagePipeline.of_stage(root, stage, device="cpu"))
        self._client = client
        self._seen = seen

    def run(self, task: Task) -> Any:
        report = task.report

        def asked(progress: JobProgress) -> None:
            report(progress)
            self._seen.append(self._client.get(f"/v1/videos/{task.job.id}").json())

        task.report = asked  # type: ignore[method-assign]  # the runner sees the protocol only
        return super().run(task)


def test_progress_is_monotone_over_the_hand_over(
    client: TestClient, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swifti2v.jobs.worker.PROGRESS_SECONDS", 0.0)
    video = create(client, size="64x64", num_frames="17").json()["id"]
    queue, seen = queue_of(client), []  # type: ignore[var-annotated]  # JSON

    def worker(stage: JobStage) -> Worker:
        runner = Asking(tiny_checkpoint, stage.value, client, seen)
        return Worker(queue.store, queue.files, runner, options=WorkerOptions(stages=(stage,)))

    assert worker(JobStage.ONE).run_one() is Outcome.HANDED_ON
    between = client.get(f"/v1/videos/{video}").json()
    assert (between["status"], between["progress"]) == ("queued", 30)
    assert client.get(f"/v1/videos/{video}/content").status_code == 409
    metrics = client.get("/metrics").text
    assert 'swifti2v_active_jobs{stage="stage_one"} 0.0' in metrics
    assert 'swifti2v_active_jobs{stage="stage_two"} 1.0' in metrics
    assert worker(JobStage.TWO).run_one() is Outcome.COMPLETED
    done = client.get(f"/v1/videos/{video}").json()
    percents = [answer["progress"] for answer in (*seen, done)]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {answer["status"] for answer in seen} == {"in_progress"}
    phases = [answer["phase"] for answer in seen if answer["phase"]]
    assert set(phases) == {"stage_one", "stage_two"}
    assert client.get(f"/v1/videos/{video}/content").status_code == 200
