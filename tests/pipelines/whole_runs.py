"""Whole runs of the tiny checkpoint: their settings, the frames and files that they leave, and passes counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swifti2v.errors import GenerationCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from swifti2v.pipelines.runs import FinishedFrames, Progress
    from swifti2v.pipelines.two_stage import TwoStagePipeline

OPTIONS = {
    "num_frames": 13,
    "seed": 3,
    "stage_one_steps": 1,
    "num_inference_steps": 2,
    "segment_size": 1,
    "flow_scale": 1.0,
}


def segments(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "segments").iterdir())}


def frames_of(pieces: Iterator[FinishedFrames]) -> torch.Tensor:
    return torch.cat([piece.frames for piece in pieces])


class Calls:
    """Counts the forward passes of a network."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        self._handle = module.register_forward_pre_hook(self._add)

    def _add(self, *_arguments: object) -> None:
        self.count += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_error: object) -> None:
        self._handle.remove()


def stage_one_calls(pipe: TwoStagePipeline) -> Calls:
    return Calls(pipe.parts.stage_one.pipeline.transformer)


def stage_two_calls(pipe: TwoStagePipeline) -> Calls:
    return Calls(pipe.parts.stage_two.transformer)


def stop_at(phase: str, done: int, error: type[BaseException] = GenerationCancelled) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if (progress.phase, progress.done) == (phase, done):
            raise error(f"stopped at {phase} {done}")

    return stop
