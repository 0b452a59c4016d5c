"""Previews, which stop after Stage I, and the videos that go on from them, on real (tiny) pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import JobError, QueueFullError
from swifti2v.geometry import Size
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobState
from swifti2v.jobs.worker import Outcome, Task, Worker
from swifti2v.media.video_reader import VideoReader
from swifti2v.settings import plain_choices

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.files import AttemptFiles
    from swifti2v.jobs.queue import JobQueue
    from swifti2v.pipelines.two_stage import TwoStagePipeline

OPTIONS = {"num_frames": 17, "segment_size": 1, "num_inference_steps": 1, "stage_one_steps": 2, "seed": 3}


@pytest.fixture
def worker(queue: JobQueue, pipeline: TwoStagePipeline) -> Worker:
    return Worker(queue.store, queue.files, PipelineRunner(lambda _name: pipeline))


def submit(queue: JobQueue, *, preview: bool) -> Job:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    request = JobRequest("tiny", "pan left", plain_choices(OPTIONS), preview=preview, keep_motion=not preview)
    return queue.submit(PIL.Image.fromarray(pixels), request, owner="ann")


def files_of(queue: JobQueue, job: Job) -> AttemptFiles:
    found = queue.store.get(job.id)
    assert found.state is JobState.COMPLETED, found.failure
    files = queue.result_files(found)
    assert files is not None
    return files


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    return np.concatenate(list(VideoReader(path)))


def stage_one_runs(pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """Record every run of Stage I from now on."""
    runs: list[Size] = []
    generate = pipeline.parts.stage_one.generate

    def counted(*arguments: Any, **options: Any) -> Any:
        runs.append(options["size"])
        return generate(*arguments, **options)

    monkeypatch.setattr(pipeline.parts.stage_one, "generate", counted)
    return runs


def test_a_preview_is_stage_one_alone(
    queue: JobQueue, worker: Worker, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.parts.stage_two, "refine", lambda *_a, **_o: pytest.fail("Stage II was run"))
    preview = submit(queue, preview=True)
    assert queue.store.get(preview.id).request.preview
    assert worker.run(until_idle=True) == 1
    files, result = files_of(queue, preview), queue.store.get(preview.id).result
    motion = pipeline.parts.motion_size(Size(64, 64))
    assert result is not None
    assert (result.width, result.height, result.num_frames) == (*motion, 17)
    assert frames_of(files.video).shape == (17, motion.height, motion.width, 3)
    assert files.thumbnail.is_file()


def test_the_video_goes_on_from_the_motion_that_was_seen(
    queue: JobQueue, worker: Worker, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = stage_one_runs(pipeline, monkeypatch)
    at_once, preview = submit(queue, preview=False), submit(queue, preview=True)
    worker.run(until_idle=True)
    assert len(runs) == 2
    continued = queue.continue_preview(preview.id)
    assert (continued.owner, continued.request.preview) == ("ann", False)
    queue.remove(preview.id)  # what the video needs must outlive it
    worker.run(until_idle=True)
    assert len(runs) == 2, "Stage I was run again"
    one, other = files_of(queue, at_once), files_of(queue, continued)
    assert one.video.read_bytes() == other.video.read_bytes()
    np.testing.assert_array_equal(frames_of(one.motion), frames_of(other.motion))
    motion = pipeline.parts.motion_size(Size(64, 64))
    assert frames_of(other.motion).shape == (17, motion.height, motion.width, 3)
    assert not other.work.exists()
    with PIL.Image.open(queue.files.input(at_once.id)) as first, PIL.Image.open(queue.files.input(continued.id)) as two:
        assert first.tobytes() == two.tobytes()


def test_nothing_is_left_of_a_video_that_cannot_begin(queue: JobQueue, worker: Worker) -> None:
    preview, video = submit(queue, preview=True), submit(queue, preview=False)
    before = set(queue.files.ids())
    with pytest.raises(JobError, match="not finished; wait for it"):
        queue.continue_preview(preview.id)
    with pytest.raises(JobError, match="is a video already"):
        queue.continue_preview(video.id)
    worker.run(until_idle=True)
    queue.store.max_active = 0
    with pytest.raises(QueueFullError):
        queue.continue_preview(preview.id)
    queue.store.max_active = 10
    files = files_of(queue, preview)
    files.work.rename(files.directory / "elsewhere")
    with pytest.raises(JobError, match="are gone; make the preview again"):
        queue.continue_preview(preview.id)
    assert set(queue.files.ids()) == before


def test_a_cancelled_preview_stops_at_its_next_step(queue: JobQueue, worker: Worker) -> None:
    preview = submit(queue, preview=True)
    phases: list[str] = []

    class CancellingRunner:
        def run(self, task: Task) -> Any:
            report = task.report

            def watched(progress: JobProgress) -> None:
                phases.append(progress.phase)
                if progress.phase:
                    queue.store.cancel(preview.id)
                report(progress)

            task.report = watched  # type: ignore[method-assign]  # the runner sees the protocol only
            return worker.runner.run(task)

    assert Worker(queue.store, queue.files, CancellingRunner()).run_one() is Outcome.CANCELLED
    assert phases == ["", "stage_one"], "the beginning, and the first step"
    assert [path.name for path in queue.files.directory(preview.id).iterdir()] == ["input.png"]
