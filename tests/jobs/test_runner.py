"""Jobs on real pipelines: the files that they leave, cancel, and going on where a dead worker stopped."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import DeviceLostError
from swifti2v.jobs.pictures import Spritesheet, _shrunk, save_thumbnail
from swifti2v.jobs.runner import PipelineRunner, ProgressGauge
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from swifti2v.media.video_reader import VideoReader
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.runs import Progress
from tests.jobs.conftest import QUICK, Reporting, files_of, submit_real

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue
    from swifti2v.jobs.state import JobProgress


def worker_of(queue: JobQueue, pipeline: TwoStagePipeline, before: Any = lambda task, progress: None) -> Worker:
    runner = Reporting(PipelineRunner(lambda _name: pipeline), before=before)
    return Worker(queue.store, queue.files, runner, options=WorkerOptions(poll_seconds=0.01, retry_seconds=0))


def test_a_job_leaves_a_video_and_its_pictures(queue: JobQueue, pipeline: TwoStagePipeline, tmp_path: Path) -> None:
    seen: list[JobProgress] = []
    job = submit_real(queue, notes=("turned",))
    assert worker_of(queue, pipeline, lambda task, progress: seen.append(progress)).run_one() is Outcome.COMPLETED
    files, result = files_of(queue, job), queue.store.get(job.id).result
    assert result is not None
    assert (result.width, result.height, result.num_frames, result.fps, result.notes[0]) == (64, 64, 17, 8, "turned")
    assert sorted(path.name for path in files.directory.iterdir()) == ["spritesheet.jpg", "thumbnail.jpg", "video.mp4"]
    bare = pipeline(queue.files.input(job.id), "pan left", **QUICK)
    assert files.video.read_bytes() == bare.save(tmp_path / "bare.mp4").read_bytes()
    assert sum(len(chunk) for chunk in VideoReader(files.video)) == 17
    gray = np.asarray(PIL.Image.fromarray(bare.frames[0].numpy()).convert("L"))
    with PIL.Image.open(files.thumbnail) as thumbnail, PIL.Image.open(files.spritesheet) as sheet:
        assert (thumbnail.size, sheet.size) == ((64, 64), (256, 256))
        assert np.abs(np.asarray(thumbnail.convert("L")).astype(int) - gray).mean() < 4
    percents = [progress.percent for progress in seen]
    assert percents == sorted(percents)
    assert max(percents) == 99
    segments = {(progress.segment, progress.num_segments) for progress in seen if progress.segment}
    assert segments == {(number, 4) for number in range(1, 5)}


@pytest.mark.parametrize("phase", ["stage_one", "stage_two"])
def test_cancel_stops_the_pipeline_at_its_next_step(queue: JobQueue, pipeline: TwoStagePipeline, phase: str) -> None:
    steps: list[str] = []

    def cancel(task: Task, progress: JobProgress) -> None:
        steps.append(progress.phase)
        if progress.phase == phase:
            queue.store.cancel(task.job.id)

    job = submit_real(queue, num_inference_steps=2)
    assert worker_of(queue, pipeline, cancel).run_one() is Outcome.CANCELLED
    assert steps.count(phase) == 1, "no step after the one at work"
    assert steps[-1] == phase
    assert [path.name for path in queue.files.directory(job.id).iterdir()] == ["input.png"]


def test_another_worker_goes_on_at_the_first_unfinished_segment(queue: JobQueue, pipeline: TwoStagePipeline) -> None:
    """The first worker drains in segment 3; the second makes no step of Stage I, nor of segments 1 and 2."""
    whole, broken = (submit_real(queue, num_inference_steps=2) for _ in range(2))
    assert worker_of(queue, pipeline).run_one() is Outcome.COMPLETED

    def drain_in_the_third(_task: Task, progress: JobProgress) -> None:
        if progress.segment == 3:
            first.drain()

    first = worker_of(queue, pipeline, drain_in_the_third)
    assert first.run_one() is Outcome.RELEASED
    # Beside the decoding of the second segment the third may have been finished before its worker was heard to drain.
    kept = len(list((queue.files.attempt(broken.id, 1).work / "segments").glob("segment_*.safetensors")))
    assert kept in (2, 3)
    again: list[JobProgress] = []
    second = worker_of(queue, pipeline, lambda task, progress: again.append(progress))
    assert second.run_one() is Outcome.COMPLETED
    assert {progress.phase for progress in again} == {"", "stage_two"}
    made_again = sorted({progress.segment for progress in again if progress.segment})
    assert made_again == list(range(kept + 1, 5))
    assert files_of(queue, broken).video.read_bytes() == files_of(queue, whole).video.read_bytes()


def test_options_that_do_not_fit_fail_the_job_at_once(queue: JobQueue, pipeline: TwoStagePipeline) -> None:
    job = submit_real(queue, few_step=False)  # of a checkpoint that is loaded for few
    assert worker_of(queue, pipeline).run_one() is Outcome.FAILED
    failure = queue.store.get(job.id).failure
    assert failure is not None
    assert failure.code == "invalid_input"


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: an illegal memory access"), OSError("no video")])
def test_a_card_that_has_failed_is_told_from_a_job_that_has(
    queue: JobQueue, pipeline: TwoStagePipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    lost: list[int] = []
    monkeypatch.setattr("swifti2v.jobs.runner.broken_devices", lambda: lost)

    def fail(_task: Task) -> None:
        raise error

    submit_real(queue)
    runner = PipelineRunner(lambda _name: pipeline)
    monkeypatch.setattr(runner, "_run", fail)
    worker = Worker(queue.store, queue.files, runner, options=WorkerOptions(retry_seconds=0))
    assert worker.run_one() is Outcome.RETRIED
    lost.append(1)
    with pytest.raises(DeviceLostError, match=r"cuda:1"):
        worker.run_one()


def test_one_pipeline_is_held_at_a_time(tiny_checkpoint: Path, picture: PIL.Image.Image) -> None:
    """A run leaves circles among the networks; 67 GiB of a card would wait there for the collector."""
    names: list[str] = []
    held: list[weakref.ref[Any]] = []

    def load(name: str) -> TwoStagePipeline:
        assert all(network() is None for network in held)
        names.append(name)
        loaded = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")
        held.extend(weakref.ref(network) for network in loaded.parts.transformers)
        return loaded

    runner = PipelineRunner(load)
    gc.disable()
    try:
        assert runner.pipeline("a") is runner.pipeline("a")
        runner.pipeline("a")(picture, "pan left", **QUICK | {"num_frames": 5, "stage_one_steps": 1})
        assert any(network() is not None for network in held)
        runner.pipeline("b")
    finally:
        gc.enable()
    assert names == ["a", "b"]


STAGE_ONE = [Progress("stage_one", step, 4) for step in range(1, 5)]
STAGE_TWO = [Progress("stage_two", 1, 2, 1, 2), Progress("frames", 5, 9), Progress("stage_two", 2, 2, 2, 2)]


@pytest.mark.parametrize(
    ("last_phase", "steps", "after_stage_one"),
    [
        ("stage_one", STAGE_ONE, 99),
        ("stage_two", [*STAGE_ONE, Progress("frames", 1, 9), *STAGE_TWO, Progress("frames", 9, 9)], 30),
        ("frames", [*STAGE_ONE, Progress("frames", 1, 9), Progress("frames", 9, 9)], 30),
    ],
)
def test_percent_never_goes_back_and_ends_below_a_hundred(
    last_phase: Literal["stage_one", "stage_two", "frames"], steps: list[Progress], after_stage_one: int
) -> None:
    gauge = ProgressGauge(last_phase)
    percents = [gauge.read(step).percent for step in steps]
    assert percents == sorted(percents)
    assert (percents[3], percents[-1]) == (after_stage_one, 99)


def test_the_sheet_holds_first_and_last_frame(tmp_path: Path) -> None:
    frames = np.stack([np.full((90, 320, 3), 5 * number, np.uint8) for number in range(49)])
    sheet = Spritesheet(len(frames))
    for start in range(0, 49, 7):
        sheet.add(frames[start : start + 7], first_frame=start)
    sheet.save(tmp_path / "sheet.jpg")
    with PIL.Image.open(tmp_path / "sheet.jpg") as picture:
        assert picture.size == (4 * 160, 4 * 45)
        grid = np.asarray(picture)[22::45, 80::160, 0].ravel()
    wanted = 5 * np.round(np.linspace(0, 48, 16))
    assert np.abs(grid.astype(int) - wanted).max() <= 3
    save_thumbnail(np.zeros((100, 2000, 3), np.uint8), tmp_path / "thumbnail.jpg")
    with PIL.Image.open(tmp_path / "thumbnail.jpg") as picture:
        assert picture.size == (480, 24)


def test_small_pictures_are_averages_of_the_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (96, 320, 3), dtype=np.uint8)
    averages = frame.reshape(48, 2, 160, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(_shrunk(frame, 160)) - averages).max() <= 1
