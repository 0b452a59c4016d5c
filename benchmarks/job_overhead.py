"""What a job costs beside its pipeline, counted directly: processor time of one thread, charged to what it is at.

Command: ``python -m benchmarks.job_overhead --sizes 64x32x9 1280x704x81``.
Two whole times that are taken from each other differ by more than a job adds, on a machine that does other things too.
So the thread's clock (`time.thread_time`, which stands still while others run) is read at every border between the
pipeline and what is around it. The least of some runs is given: what the machine does else only adds.

The service is measured by itself: a request over ASGI, the test client's part included, so it is an upper bound; the
child process that decodes the picture counts. The heartbeat is left out, which renews the lease every ten seconds.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import PIL.Image
import psutil
import torch
from starlette.testclient import TestClient

from benchmarks.results import add_result_arguments, markdown_table, say, settings_of, write_results
from swifti2v.geometry import Size
from swifti2v.jobs import runner as runner_module
from swifti2v.jobs.files import JobFiles
from swifti2v.jobs.pictures import Spritesheet
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.jobs.state import JobRequest
from swifti2v.jobs.store import JobStore
from swifti2v.jobs.worker import Outcome, Task, Worker
from swifti2v.media.video_writer import VideoWriter
from swifti2v.runner.loading import settings_of as settings_of_model
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.serving.application import create_app
from swifti2v.serving.settings import ServedModel, ServiceSettings
from swifti2v.settings import plain_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swifti2v.runs import FinishedFrames

PIPELINE = "pipeline and writing"
"""What a run without a job has too: the frames, and the file that they are written into."""

NUM_POLLS = 50
SERVED_RUNS = 10

PARTS: tuple[tuple[Any, str, str], ...] = (
    (JobQueue, "submit", "submit"),
    (JobStore, "claim", "claim"),
    (JobFiles, "begin_attempt", "files"),
    (JobFiles, "keep_only", "files"),
    (JobStore, "complete", "complete"),
    (Task, "report", "progress"),
    (runner_module, "save_thumbnail", "pictures"),
    (Spritesheet, "add", "pictures"),
    (Spritesheet, "save", "pictures"),
    (TwoStagePipeline, "request", PIPELINE),
    (VideoWriter, "write", PIPELINE),
    (VideoWriter, "__enter__", PIPELINE),
    (VideoWriter, "__exit__", PIPELINE),
)


class Account:
    """Processor time of this thread by what it is at; the innermost of nested parts is charged."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._at = ["rest"]
        self._since = time.thread_time()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Charge what happens within to `part`."""
        self._charge()
        self._at.append(part)
        try:
            yield
        finally:
            self._charge()
            self._at.pop()

    def wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return `function` with its time charged to `part`."""

        @wraps(function)
        def charged(*arguments: Any, **options: Any) -> Any:
            with self.during(part):
                return function(*arguments, **options)

        return charged

    def iterated(self, function: Callable[..., Iterator[FinishedFrames]]) -> Callable[..., Iterator[FinishedFrames]]:
        """Return `function` with the time in which it makes its items charged to the pipeline."""

        @wraps(function)
        def charged(*arguments: Any, **options: Any) -> Iterator[FinishedFrames]:
            pieces = function(*arguments, **options)
            try:
                while True:
                    with self.during(PIPELINE):
                        piece = next(pieces, None)
                    if piece is None:
                        return
                    yield piece
            finally:
                with self.during(PIPELINE):
                    pieces.close()  # type: ignore[attr-defined]  # a generator

        return charged

    def _charge(self) -> None:
        now = time.thread_time()
        self.seconds[self._at[-1]] += now - self._since
        self._since = now


def one_job(queue: JobQueue, pipeline: TwoStagePipeline, options: dict[str, Any]) -> dict[str, float]:
    """Submit and do one job; return its processor seconds by part, and of the whole process as ``process``."""
    image = PIL.Image.effect_noise(options.get("size", Size(64, 32)), 64).convert("RGB")
    with ExitStack() as stack:
        account = Account()
        for owner, name, part in PARTS:
            stack.enter_context(mock.patch.object(owner, name, account.wrapped(getattr(owner, name), part)))
        stack.enter_context(mock.patch.object(pipeline, "stream", account.iterated(pipeline.stream)))
        worker = Worker(queue.store, queue.files, PipelineRunner(lambda _name: pipeline))
        started = time.process_time()
        with account.during("rest"):
            job = queue.submit(image, JobRequest("mini", "the camera pans left", plain_choices(options)))
            outcome = worker.run_one()
        process = time.process_time() - started
    if outcome is not Outcome.COMPLETED:
        msg = f"the job ended otherwise: {queue.store.get(job.id).failure}"
        raise RuntimeError(msg)
    queue.remove(job.id)
    return dict(account.seconds) | {"process": process}


def measured(size: str, num_runs: int) -> dict[str, float]:
    """Return the least seconds of each part over some jobs of a size, after one that is not counted."""
    *shape, num_frames = size.rsplit("x", 1)
    options = {"size": Size.parse(shape[0]), "num_frames": int(num_frames), "seed": 1}
    pipeline = TwoStagePipeline.from_pretrained("mini", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        queue = JobQueue.open(Path(folder))
        one_job(queue, pipeline, {"size": Size(64, 32), "num_frames": 9, "seed": 1})
        runs = []
        for number in range(num_runs):
            runs.append(one_job(queue, pipeline, options))
            say(f"{size}, run {number + 1}: {added(runs[-1]) * 1000:.1f} ms beside {runs[-1]['process']:.2f} s")
        queue.store.database.close()
    least = {part: min(run.get(part, 0.0) for run in runs) for part in sorted({part for run in runs for part in run})}
    totals = sorted(map(added, runs))
    return least | {"added": totals[0], "added_median": totals[len(totals) // 2], "added_most": totals[-1]}


def served(size: str, num_runs: int) -> dict[str, float]:
    """Return the least processor seconds of creating a video over HTTP, its children's too, and of asking for it."""
    *shape, num_frames = size.rsplit("x", 1)
    content = io.BytesIO()
    PIL.Image.effect_noise(Size.parse(shape[0]), 64).convert("RGB").save(content, "PNG")
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        settings = ServiceSettings(data=Path(folder), models=(ServedModel("mini", settings_of_model("mini")),))
        with TestClient(create_app(settings)) as client:
            for _ in range(num_runs + 1):  # the first starts the child
                before, started = _of_children(), time.process_time()
                files = {"input_reference": ("a.png", content.getvalue(), "image/png")}
                fields = {"prompt": "pan", "size": shape[0], "num_frames": num_frames}
                video = client.post("/v1/videos", data=fields, files=files).json()["id"]
                created = time.process_time()
                found["create"].append(created - started)
                found["create, child"].append(_of_children() - before)
                for _ in range(NUM_POLLS):
                    client.get(f"/v1/videos/{video}")
                found["ask"].append((time.process_time() - created) / NUM_POLLS)
    return {part: min(values[1:]) for part, values in found.items()}


def _of_children() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def added(seconds: dict[str, float]) -> float:
    """Return what a job has added: everything that is neither the pipeline nor the writing of its file."""
    return sum(value for part, value in seconds.items() if part not in {PIPELINE, "process"})


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["64x32x9", "1280x704x81"], help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--runs", type=int, nargs="+", default=[20, 3], help="jobs of each size")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {size: measured(size, runs) for size, runs in zip(arguments.sizes, arguments.runs, strict=True)}
    services = {size: served(size, SERVED_RUNS) for size in arguments.sizes}
    parts = sorted({part for row in rows.values() for part in row} - {PIPELINE, "process"})
    table = [(part, *(_milliseconds(row.get(part, 0.0)) for row in rows.values())) for part in parts]
    table += [
        (part, *(_milliseconds(row[part]) for row in services.values())) for part in next(iter(services.values()))
    ]
    table.append(("pipeline", *(_milliseconds(row["process"] - row["added"]) for row in rows.values())))
    shares = [row["added"] / (row["process"] - row["added"]) for row in rows.values()]
    table.append(("added, % of it", *(f"{100 * share:.2f}" for share in shares)))
    say(markdown_table(("milliseconds of processor time", *rows), table))
    content = {"settings": settings_of(arguments), "seconds": rows, "service_seconds": services}
    say(str(write_results("job_overhead", content, arguments.output)))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


if __name__ == "__main__":
    main()
