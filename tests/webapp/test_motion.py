"""Previews and the videos that go on from them, on real (tiny) pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from swifti2v.errors import JobError, QueueFullError
from swifti2v.geometry import Size
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobState
from swifti2v.jobs.worker import Outcome, Worker, WorkerOptions
from swifti2v.media.video_reader import VideoReader
from swifti2v.webapp.motion import is_preview, motion_video

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.state import Job
    from swifti2v.pipelines.two_stage import TwoStagePipeline
    from swifti2v.webapp.studio import Form, Studio


def frames_of(path: Path) -> np.ndarray[Any, Any]:
    return np.concatenate(list(VideoReader(path)))


def finished(studio: Studio, job: Job) -> Job:
    found = studio.queue.store.get(job.id)
    assert found.state is JobState.COMPLETED, found.failure
    return found


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
    studio: Studio, form: Form, worker: Worker, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.parts.stage_two, "refine", lambda *_a, **_o: pytest.fail("Stage II was run"))
    preview = studio.preview(form)
    assert is_preview(preview.request)
    assert worker.run(until_idle=True) == 1
    job = finished(studio, preview)
    motion = pipeline.parts.motion_size(Size(64, 64))
    assert job.result is not None
    assert (job.result.width, job.result.height, job.result.num_frames) == (*motion, 17)
    files = studio.queue.result_files(job)
    assert files is not None
    assert frames_of(files.video).shape == (17, motion.height, motion.width, 3)
    assert files.thumbnail.is_file()


def test_the_video_goes_on_from_the_motion_that_was_seen(
    studio: Studio, form: Form, worker: Worker, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = stage_one_runs(pipeline, monkeypatch)
    at_once = studio.video(form)
    preview = studio.preview(form)
    worker.run(until_idle=True)
    assert len(runs) == 2
    continued = studio.go_on(preview.id)
    studio.remove(preview.id)  # what the video needs must outlive it
    worker.run(until_idle=True)
    assert len(runs) == 2, "Stage I was run again"
    one, other = (studio.queue.result_files(finished(studio, job)) for job in (at_once, continued))
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(frames_of(one.video), frames_of(other.video))
    np.testing.assert_array_equal(frames_of(motion_video(one)), frames_of(motion_video(other)))
    assert len(frames_of(motion_video(other))) == 17


def test_nothing_is_left_of_a_video_that_cannot_begin(studio: Studio, form: Form, worker: Worker) -> None:
    preview = studio.preview(form)
    before = set(studio.queue.files.ids())
    with pytest.raises(JobError, match="not finished; wait for it"):
        studio.go_on(preview.id)
    worker.run(until_idle=True)
    studio.queue.store.max_active = 0
    with pytest.raises(QueueFullError):
        studio.go_on(preview.id)
    studio.queue.store.max_active = 10
    done = studio.queue.result_files(studio.queue.store.get(preview.id))
    assert done is not None
    (done.directory / "motion").rename(done.directory / "elsewhere")
    with pytest.raises(JobError, match="are gone; make the preview again"):
        studio.go_on(preview.id)
    assert set(studio.queue.files.ids()) == before


def test_a_video_is_not_a_preview(studio: Studio, form: Form, worker: Worker) -> None:
    video = studio.video(form)
    worker.run(until_idle=True)
    with pytest.raises(JobError, match="is a video already"):
        studio.go_on(video.id)


def test_workers_that_know_no_previews_leave_them(studio: Studio, form: Form, worker: Worker) -> None:
    preview = studio.preview(form)
    plain = Worker(worker.store, worker.files, worker.runner, options=WorkerOptions(models=(studio.model,)))
    assert plain.run(until_idle=True) == 0
    assert studio.queue.store.get(preview.id).state is JobState.QUEUED


def test_other_settings_of_stage_one_are_refused_not_mixed(studio: Studio, form: Form, worker: Worker) -> None:
    preview = studio.preview(form)
    worker.run(until_idle=True)
    store = studio.queue.store
    done = store.get(preview.id)
    from swifti2v.webapp.motion import continue_preview

    request = replace(done.request, model=studio.model, options={**done.request.options, "seed": 4})
    wrong = continue_preview(studio.queue, done, request)
    assert worker.run_one() in (Outcome.RETRIED, Outcome.FAILED)
    assert store.get(wrong.id).state is not JobState.COMPLETED


def test_a_cancelled_preview_stops_at_its_next_step(
    studio: Studio, form: Form, worker: Worker, pipeline: TwoStagePipeline
) -> None:
    preview = studio.preview(form)
    steps: list[int] = []

    class CancelledRunner:
        def run(self, task: Any) -> Any:
            report = task.report

            def watched(progress: Any) -> None:
                steps.append(progress.percent)
                if progress.phase:
                    studio.cancel(preview.id)
                report(progress)

            task.report = watched
            return worker.runner.run(task)

    stopping = Worker(worker.store, worker.files, CancelledRunner(), options=worker.options)
    assert stopping.run_one() is Outcome.CANCELLED
    assert len(steps) == 2  # the beginning, and the first step
    assert studio.queue.store.get(preview.id).state is JobState.CANCELLED
    assert studio.look(preview.id)[0]["headline"] == "Cancelled"  # type: ignore[index]


def test_a_queue_of_another_folder_has_other_jobs(studio: Studio, form: Form, tmp_path: Path) -> None:
    preview = studio.preview(form)
    with pytest.raises(JobError):
        JobQueue.open(tmp_path / "other").store.get(preview.id)
