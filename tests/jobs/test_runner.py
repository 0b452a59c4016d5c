"""Jobs on real pipelines: the files that they leave, cancel, and going on where a dead worker stopped."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import DeviceLostError
from swifti2v.geometry import Size
from swifti2v.jobs.pictures import Spritesheet, _shrunk, save_thumbnail
from swifti2v.jobs.runner import PipelineRunner, ProgressGauge
from swifti2v.jobs.state import Job, JobProgress, JobRequest, JobState
from swifti2v.jobs.worker import Outcome, Task, Worker, WorkerOptions
from swifti2v.media.video_reader import VideoReader
from swifti2v.pipelines.acceleration import transformers_of
from swifti2v.pipelines.runs import Progress
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.settings import plain_choices
from tests.jobs.conftest import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from swifti2v.jobs.queue import JobQueue

OPTIONS = {"num_frames": 17, "segment_size": 1, "num_inference_steps": 2, "stage_one_steps": 2, "seed": 3}


@pytest.fixture
def photo() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def submit(queue: JobQueue, photo: PIL.Image.Image, model: str = "tiny", **changes: Any) -> Job:
    options = {**OPTIONS, **changes}
    return queue.submit(photo, JobRequest(model, "pan left", plain_choices(options), ("turned",)))


class WatchedRunner(PipelineRunner):
    """Calls `on_step` with every report of the pipeline before the worker sees it."""

    def __init__(self, pipeline: TwoStagePipeline, on_step: Callable[[Task, JobProgress], None]) -> None:
        super().__init__(lambda _name: pipeline)
        self._on_step = on_step

    def run(self, task: Task) -> Any:
        report, on_step = task.report, self._on_step

        def watched(progress: JobProgress) -> None:
            on_step(task, progress)
            report(progress)

        task.report = watched  # type: ignore[method-assign]  # the runner sees the protocol only
        return super().run(task)


def worker_of(queue: JobQueue, pipeline: TwoStagePipeline, on_step: Any = lambda task, progress: None) -> Worker:
    return Worker(queue.store, queue.files, WatchedRunner(pipeline, on_step), options=WorkerOptions(poll_seconds=0.01))


def video_bytes(queue: JobQueue, job: Job) -> bytes:
    files = queue.result_files(queue.store.get(job.id))
    assert files is not None
    return files.video.read_bytes()


def test_a_job_leaves_a_video_and_its_pictures(
    queue: JobQueue, pipeline: TwoStagePipeline, photo: PIL.Image.Image, tmp_path: Path
) -> None:
    seen: list[JobProgress] = []
    job = submit(queue, photo)
    assert worker_of(queue, pipeline, lambda task, progress: seen.append(progress)).run_one() is Outcome.COMPLETED
    done = queue.store.get(job.id)
    assert done.result is not None
    assert (done.result.width, done.result.height, done.result.num_frames, done.result.fps) == (64, 64, 17, 8)
    assert done.result.notes[0] == "turned"
    files = queue.result_files(done)
    assert files is not None
    left = sorted(path.name for path in files.directory.iterdir())
    assert left == ["spritesheet.jpg", "thumbnail.jpg", "video.mp4"]
    bare = pipeline(photo, "pan left", **OPTIONS)
    assert files.video.read_bytes() == bare.save(tmp_path / "bare.mp4").read_bytes()
    assert sum(len(chunk) for chunk in VideoReader(files.video)) == 17
    grey = np.asarray(PIL.Image.fromarray(bare.frames[0].numpy()).convert("L"))
    with PIL.Image.open(files.thumbnail) as thumbnail, PIL.Image.open(files.spritesheet) as sheet:
        assert (thumbnail.size, sheet.size) == ((64, 64), (256, 256))
        assert np.abs(np.asarray(thumbnail.convert("L")).astype(int) - grey).mean() < 4
    percents = [progress.percent for progress in seen]
    assert percents == sorted(percents)
    assert max(percents) == 99
    assert {(progress.segment, progress.num_segments) for progress in seen if progress.segment} == {
        (number, 4) for number in range(1, 5)
    }


@pytest.mark.parametrize("phase", ["stage_one", "stage_two"])
def test_cancel_stops_the_pipeline_at_its_next_step(
    queue: JobQueue, pipeline: TwoStagePipeline, photo: PIL.Image.Image, phase: str
) -> None:
    steps: list[str] = []

    def cancel(task: Task, progress: JobProgress) -> None:
        steps.append(progress.phase)
        if progress.phase == phase:
            queue.store.cancel(task.job.id)

    job = submit(queue, photo)
    assert worker_of(queue, pipeline, cancel).run_one() is Outcome.CANCELLED
    assert steps.count(phase) == 1, "no step after the one at work"
    assert steps[-1] == phase
    assert [path.name for path in queue.files.directory(job.id).iterdir()] == ["input.png"]


def test_another_worker_goes_on_at_the_first_unfinished_segment(
    queue: JobQueue, pipeline: TwoStagePipeline, photo: PIL.Image.Image
) -> None:
    """The first worker drains in segment 3; the second makes no step of Stage I, nor of segments 1 and 2."""
    whole, broken = submit(queue, photo), submit(queue, photo)
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
    assert video_bytes(queue, broken) == video_bytes(queue, whole)


def test_options_that_do_not_fit_fail_the_job_at_once(
    queue: JobQueue, pipeline: TwoStagePipeline, photo: PIL.Image.Image
) -> None:
    job = submit(queue, photo, num_frames=10)
    assert worker_of(queue, pipeline).run_one() is Outcome.FAILED
    failure = queue.store.get(job.id).failure
    assert failure is not None
    assert failure.code == "invalid_input"


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: an illegal memory access"), OSError("no video")])
def test_a_card_that_has_failed_is_told_from_a_job_that_has(
    queue: JobQueue,
    pipeline: TwoStagePipeline,
    photo: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    lost: list[int] = []
    monkeypatch.setattr("swifti2v.jobs.runner.broken_devices", lambda: lost)

    def fail(_task: Task, _progress: JobProgress) -> None:
        raise error

    submit(queue, photo)
    worker = worker_of(queue, pipeline, fail)
    worker.options = WorkerOptions(retry_seconds=0)
    assert worker.run_one() is Outcome.RETRIED
    lost.append(1)
    with pytest.raises(DeviceLostError, match=rf"cuda:1 does not work any more \({error}\)"):
        worker.run_one()


def test_networks_are_gone_before_the_next_are_loaded(tiny_checkpoint: Path, photo: PIL.Image.Image) -> None:
    """A run leaves circles among them; 67 GiB of a card would wait there for the collector."""
    held: list[weakref.ref[Any]] = []

    def load(_name: str) -> TwoStagePipeline:
        assert all(network() is None for network in held)
        loaded = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")
        held.extend(weakref.ref(network) for network in transformers_of(loaded.parts))
        return loaded

    runner = PipelineRunner(load)
    gc.disable()
    try:
        runner.pipeline("a")(photo, "pan left", **OPTIONS)
        assert any(network() is not None for network in held)
        runner.pipeline("b")
    finally:
        gc.enable()


def test_one_pipeline_is_held_at_a_time() -> None:
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return name

    runner = PipelineRunner(load)
    assert [runner.pipeline(name) for name in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert loaded == ["a", "b", "a"]


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


MINI = {"size": Size(64, 32), "num_frames": 41, "segment_size": 1, "num_inference_steps": 4, "seed": 1}
STUCK_WORKER = """
import sys, time
from pathlib import Path
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.worker import Worker, WorkerOptions
from swifti2v.pipelines.two_stage import TwoStagePipeline
class Stuck(PipelineRunner):
    def run(self, task):
        report = task.report
        def stuck(progress):
            report(progress)
            if progress.segment == 4:
                time.sleep(3600)  # until it is killed
        task.report = stuck
        return super().run(task)
queue = JobQueue.open(Path(sys.argv[1]))
runner = Stuck(lambda name: TwoStagePipeline.from_pretrained(name, device="cpu"))
Worker(queue.store, queue.files, runner, options=WorkerOptions(lease_seconds=1.0)).run(max_jobs=1)
"""


@pytest.mark.slow
def test_a_killed_worker_of_mini_is_succeeded(queue: JobQueue, photo: PIL.Image.Image) -> None:
    """SIGKILL in the middle: a new worker finishes the job, and its file is that of a run without a break."""
    job = submit(queue, photo, model="mini", **MINI.__dict__)
    killed = subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, "-c", STUCK_WORKER, str(queue.files.root)]
    )
    try:
        wait_for(lambda: queue.store.get(job.id).progress.segment == 4)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert queue.store.get(job.id).state is JobState.IN_PROGRESS
    mini = TwoStagePipeline.from_pretrained("mini", device="cpu")
    again: list[JobProgress] = []
    assert worker_of(queue, mini, lambda task, progress: again.append(progress)).run(max_jobs=1) == 1
    assert queue.store.get(job.id).state is JobState.COMPLETED
    assert min(progress.segment for progress in again if progress.segment) >= 4
    assert "stage_one" not in {progress.phase for progress in again}
    assert queue.store.get(job.id).attempts == 2

    unbroken = submit(queue, photo, model="mini", **MINI.__dict__)
    assert worker_of(queue, mini).run_one() is Outcome.COMPLETED
    assert video_bytes(queue, job) == video_bytes(queue, unbroken)
