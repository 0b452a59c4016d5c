"""A folder of pictures: each becomes one video, in a queue that is too small, and across an interruption."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import PIL.Image
import pytest

from swifti2v.errors import ImageInputError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.jobs.batch import Batch, pictures_in
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.worker import Worker, WorkerOptions
from tests.jobs.conftest import StepRunner, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from swifti2v.jobs.worker import Task

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        PIL.Image.new("RGB", (8, 4)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("waves roll\n")
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue with room for two."""
    queue = JobQueue.open(tmp_path / "data", max_active=2)
    yield queue
    queue.store.database.close()


def batch_of(queue: JobQueue, output: Path) -> Batch:
    return Batch(queue, output, model="tiny", choices={"size": Size(64, 32)}, poll_seconds=0.01)


def work(queue: JobQueue, runner: StepRunner, num_jobs: int) -> threading.Thread:
    worker = Worker(queue.store, queue.files, runner, options=WorkerOptions(poll_seconds=0.01))
    thread = threading.Thread(target=worker.run, kwargs={"max_jobs": num_jobs})
    thread.start()
    return thread


def test_prompts_are_beside_the_pictures(folder: Path) -> None:
    pictures = pictures_in(folder, prompt="still")
    assert [picture.path.stem for picture in pictures] == list(NAMES)
    assert [picture.prompt for picture in pictures] == ["still", "waves roll", "still", "still", "still"]


def test_every_picture_becomes_a_video(small: JobQueue, folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    thread = work(small, StepRunner(), len(NAMES))
    assert batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=said.append) == ()
    thread.join()
    videos = {path.name: json.loads(path.read_text()) for path in (tmp_path / "videos").iterdir()}
    assert sorted(videos) == [f"{name}.mp4" for name in NAMES], "and nothing besides"
    made_by = {job.id: job.request for job in small.store.list(limit=10)}
    assert len({job_id for job_id, _claim in videos.values()}) == len(NAMES)
    assert made_by[videos["b.mp4"][0]].prompt == "waves roll"
    assert made_by[videos["b.mp4"][0]].options["size"] == [64, 32]
    assert sorted(said) == [f"{name}.png: completed" for name in NAMES]


def test_a_stopped_batch_goes_on_where_it_was(small: JobQueue, folder: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_line: str) -> None:
        raise StopError

    thread = work(small, StepRunner(), len(NAMES))
    with pytest.raises(StopError):
        batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=stop)
    assert batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=str) == ()
    thread.join()
    assert len(small.store.list(limit=10)) == len(NAMES), "none was queued twice"
    again = batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=stop)
    assert again == (), "all is there: nothing changes"


def test_failures_are_named_and_tried_again(small: JobQueue, folder: Path, tmp_path: Path) -> None:
    def refuse(task: Task, _step: int) -> None:
        if task.job.request.prompt:
            raise InvalidInputError("not this one")

    thread = work(small, StepRunner(on_step=refuse), len(NAMES))
    assert batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=str) == ("b.png",)
    thread.join()
    thread = work(small, StepRunner(), 1)
    assert batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=str) == ()
    thread.join()
    wait_for((tmp_path / "videos" / "b.mp4").exists)


def test_folders_that_cannot_be_used(folder: Path, small: JobQueue, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no folder"):
        pictures_in(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="holds no pictures"):
        pictures_in(tmp_path / "empty")
    (folder / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(InvalidInputError, match="two pictures are called a"):
        pictures_in(folder)
    (folder / "a.png").unlink()
    with pytest.raises(ImageInputError):
        batch_of(small, tmp_path / "videos").run(pictures_in(folder), on_change=str)
