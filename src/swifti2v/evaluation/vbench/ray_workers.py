"""The work list on a cluster, through Ray Data: each worker loads the model once and takes clips as it gets free.

Ray is optional (``pip install 'ray[data]'``). The folder of the run must be one that all machines share. For a fixed
number of machines without Ray, ``--shard i/n`` does the same.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.evaluation.vbench.clips import Clip
from swifti2v.evaluation.vbench.generation import RECORD_NAME, ClipRecord, append_record, open_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from swifti2v.evaluation.vbench.generation import MakerSettings, OnClip


@dataclass(frozen=True)
class RayJob:
    """What every worker is told: plain values.

    Args:
        folder: of the run, on storage that all workers share.
        settings: of the model.
        seed: of the run.
    """

    folder: Path
    settings: MakerSettings
    seed: int


class ClipWorker:
    """A worker of Ray Data: loads the model when it is created, makes a clip for each row."""

    def __init__(self, job: RayJob) -> None:
        self._run, self._maker = open_run(job.folder, job.settings, seed=job.seed)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Make the clip of a row unless it is there; return its record as JSON, empty for one that was there."""
        clip = Clip(row["prompt"], int(row["index"]), row["image"], int(row["seed"]))
        if self._run.is_made(clip, self._maker.shape):
            return {"record": ""}
        return {"record": json.dumps(asdict(self._run.make(clip, self._maker)))}


def make_videos_with_ray(
    clips: Sequence[Clip], job: RayJob, *, num_workers: int, gpus_per_worker: float, on_clip: OnClip | None = None
) -> int:
    """Make the videos that are not there yet with `num_workers` workers; return how many were made.

    Args:
        clips: of the run.
        job: what the workers are told.
        num_workers: each with a model of its own.
        gpus_per_worker: cards that Ray gives to each; 0 for work on the CPU.
        on_clip: see `OnClip`; called in the order in which clips are finished.

    Raises:
        ConfigurationError: Ray is not installed.
        InvalidInputError: fewer than one worker.
    """
    if num_workers < 1:
        msg = f"{num_workers} workers; use at least 1"
        raise InvalidInputError(msg)
    try:
        data = importlib.import_module("ray.data")
    except ImportError as error:
        msg = "Ray is not installed; pip install 'ray[data]', or divide the work with --shard i/n"
        raise ConfigurationError(msg) from error
    # A block for each clip, so that a record arrives as soon as its video is there.
    rows = data.from_items([asdict(clip) for clip in clips], override_num_blocks=max(1, len(clips)))
    workers = data.ActorPoolStrategy(size=num_workers)
    finished = rows.map(ClipWorker, fn_constructor_args=(job,), compute=workers, num_cpus=1, num_gpus=gpus_per_worker)
    num_made = 0
    for done, row in enumerate(finished.iter_rows(), start=1):
        record = ClipRecord(**json.loads(row["record"])) if row["record"] else None
        if record is not None:
            append_record(job.folder / RECORD_NAME, record)
            num_made += 1
        if on_clip is not None:
            on_clip(done, len(clips), record)
    return num_made
