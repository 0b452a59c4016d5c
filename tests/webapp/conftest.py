"""A queue on disk, a picture, and a worker of the app on the tiny checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.worker import Worker, WorkerOptions
from swifti2v.webapp.studio import Form, Studio

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runner.two_stage import TwoStagePipeline


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> TwoStagePipeline:
    from swifti2v.runner.two_stage import TwoStagePipeline

    return TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def queue(tmp_path: Path) -> JobQueue:
    return JobQueue.open(tmp_path / "data")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def studio(queue: JobQueue, tiny_checkpoint: Path) -> Studio:
    return Studio(queue, str(tiny_checkpoint))


@pytest.fixture
def form(photo: Path) -> Form:
    return Form(str(photo), "pan left", "64x64", num_frames=17, num_inference_steps=1, seed=3)


@pytest.fixture
def worker(studio: Studio, pipeline: TwoStagePipeline) -> Worker:
    options = WorkerOptions(models=(studio.model,), poll_seconds=0.01)
    return Worker(studio.queue.store, studio.queue.files, PipelineRunner(lambda _name: pipeline), options=options)
