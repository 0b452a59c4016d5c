"""Previews, which stop after Stage I, and the videos that go on from them, on real (tiny) pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import JobError, QueueFullError
from swifti2v.geometry import Size
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.worker import Outcome, Task, Worker
from swifti2v.media.video_reader import VideoReader
from tests.jobs.conftest import Reporting, files_of, submit_real

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.state import JobProgress
    from swifti2v.runner.two_stage import TwoStagePipeline


@pytest.fixture
def worker(queue: JobQueue, pipeline: TwoStagePipeline) -> Worker:
    return Worker(queue.store, queue.files, PipelineRunner(lambda _name: pipeline))


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    return np.concatenate(list(VideoReader(path)))


def test_the_video_goes_on_from_the_motion_that_was_seen(
    queue: JobQueue, worker: Worker, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, preview = submit_real(queue, keep_motion=True, owner="ann"), submit_real(queue, preview=True, owner="ann")
    assert worker.run_one() is Outcome.COMPLETED
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.parts.stage_two, "refine", lambda *_a, **_o: pytest.fail("Stage II was run"))
        assert worker.run_one() is Outcome.COMPLETED
    made, result = files_of(queue, preview), queue.store.get(preview.id).result
    motion = pipeline.parts.motion_size(Size(64, 64))
    assert result is not None
    assert (result.width, result.height, result.num_frames) == (*motion, 17)
    assert frames_of(made.video).shape == (17, motion.height, motion.width, 3)
    assert made.thumbnail.is_file()
    monkeypatch.setattr(pipeline.parts.stage_one, "generate", lambda *_a, **_o: pytest.fail("Stage I was run again"))
    continued = queue.continue_preview(preview.id)
    assert (continued.owner, continued.request.preview) == ("ann", False)
    queue.remove(preview.id)  # what the video needs must outlive it
    worker.run(until_idle=True)
    one, other = files_of(queue, at_once), files_of(queue, continued)
    assert one.video.read_bytes() == other.video.read_bytes()
    np.testing.assert_array_equal(frames_of(one.motion), frames_of(other.motion))
    assert frames_of(other.motion).shape == (17, motion.height, motion.width, 3)
    assert not other.work.exists()
    with PIL.Image.open(queue.files.input(at_once.id)) as first, PIL.Image.open(queue.files.input(continued.id)) as two:
        assert first.tobytes() == two.tobytes()


def test_nothing_is_left_of_a_video_that_cannot_begin(queue: JobQueue, worker: Worker) -> None:
    preview, video = submit_real(queue, preview=True, stage_one_steps=1), submit_real(queue)
    before = set(queue.files.ids())
    for job in (preview, video):  # not finished; a video already
        with pytest.raises(JobError):
            queue.continue_preview(job.id)
    assert worker.run(max_jobs=1) == 1
    queue.store.max_active = 0
    with pytest.raises(QueueFullError):
        queue.continue_preview(preview.id)
    queue.store.max_active = 10
    files = files_of(queue, preview)
    files.work.rename(files.directory / "elsewhere")
    with pytest.raises(JobError):
        queue.continue_preview(preview.id)
    assert set(queue.files.ids()) == before


def test_a_cancelled_preview_stops_at_its_next_step(queue: JobQueue, worker: Worker) -> None:
    preview = submit_real(queue, preview=True)
    phases: list[str] = []

    def cancel(_task: Task, progress: JobProgress) -> None:
        phases.append(progress.phase)
        if progress.phase:
            queue.store.cancel(preview.id)

    cancelling = Reporting(worker.runner, before=cancel)
    assert Worker(queue.store, queue.files, cancelling).run_one() is Outcome.CANCELLED
    assert phases == ["", "stage_one"], "the beginning, and the first step"
    assert [path.name for path in queue.files.directory(preview.id).iterdir()] == ["input.png"]
