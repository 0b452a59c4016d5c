"""Both stages of a checkpoint on a host that has room for one: Stage I is loaded, run and let go of before Stage II.

Between them lie the motion reference and the prompt as it was read, in the work directory (`run_store.py`). For one
video this takes no longer, for every network is read once anyway; who makes many keeps both stages, or a card for each.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from swifti2v.memory.heap import trim_heap
from swifti2v.memory.placement import storages_of
from swifti2v.memory.plan import plan_stages
from swifti2v.pipelines.fitting import ASSUMED_RATES, MemoryLimits, networks_of
from swifti2v.pipelines.loading import load_parts
from swifti2v.pipelines.run_store import RunStore
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.settings import checked_choices
from swifti2v.wan.checkpoints import PARTS, resolve

if TYPE_CHECKING:
    from swifti2v.pipelines.acceleration import Acceleration
    from swifti2v.pipelines.runs import FinishedFrames, GenerationRequest, OnProgress
    from swifti2v.wan.checkpoints import Part


def open_pipeline(
    name_or_path: str | Path,
    choices: Mapping[str, Any] | None = None,
    *,
    memory: MemoryLimits | None = None,
    acceleration: Acceleration | None = None,
    **others: Any,
) -> TwoStagePipeline:
    """Load a checkpoint for one video: both stages, or neither yet where the host has room for one at a time only.

    Args:
        name_or_path: as in `TwoStagePipeline.from_pretrained`, as are the others.
        choices: settings of the video, as in a call.
        memory: with a limit of host memory it is asked whether there is room for both stages as they are.
        acceleration: see there.
        **others: see there.

    Raises:
        CheckpointError, InvalidInputError: as there.
        MemoryBudgetError: not even one stage at a time fits.
    """
    if memory is not None and memory.host_bytes is not None:
        in_turn = StagesInTurn(name_or_path, memory=memory, acceleration=acceleration, **others)
        if in_turn.is_needed(choices):
            resolve(name_or_path, **{name: others[name] for name in ("revision", "local_files_only") if name in others})
            return in_turn
    return TwoStagePipeline.from_pretrained(name_or_path, memory=memory, acceleration=acceleration, **others)


class StagesInTurn(TwoStagePipeline):
    """A pipeline that loads a stage when a video needs it, and holds no networks before and after.

    Args:
        name_or_path: as in `TwoStagePipeline.from_pretrained`, as are the others.
        acceleration: see there.
        **options: see there.
    """

    def __init__(self, name_or_path: str | Path, *, acceleration: Acceleration | None = None, **options: Any) -> None:
        load = partial(load_parts, name_or_path, acceleration=acceleration, **options)
        super().__init__(load(stages=()))
        self._load = load
        self._products = acceleration.quantization if acceleration is not None else "none"

    def is_needed(self, choices: Mapping[str, Any] | None = None) -> bool:
        """Return whether the limits of memory have no room for both stages with their weights as they are.

        Raises:
            InvalidInputError: a choice is unknown or out of its range.
            MemoryBudgetError: not even one stage at a time fits.
        """
        chosen, limits = checked_choices(choices or {}), self.parts.memory or MemoryLimits()
        settings = self.parts.defaults_of(chosen.get("few_step")).settled(chosen)
        plans = plan_stages(
            replace(networks_of(self.parts), stages=PARTS, quantization=self._products),
            replace(settings, keep_context=self.parts.stage_two.keeps_context(settings)),
            ASSUMED_RATES,
            budget_bytes=limits.device_bytes,
            host_bytes=limits.host_bytes,
            storages=storages_of(self.parts.stage_two.transformer.dtype),
        )
        return len(plans) > 1

    def stream(
        self,
        request: GenerationRequest,
        *,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield frames as segments finish, as `TwoStagePipeline.stream` does; Stage I runs if it has not yet."""
        with RunStore.open(Path(work_dir) if work_dir is not None else None) as store:
            if not self._holds_stage_one(request, store):
                with closing(self.preview(request, work_dir=store.directory, on_progress=on_progress)) as pieces:
                    for piece in pieces:
                        del piece
            yield from self._of_stage("stage_two", "stream", request, work_dir=store.directory, on_progress=on_progress)

    def preview(
        self,
        request: GenerationRequest,
        *,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield the motion reference, as `TwoStagePipeline.preview` does."""
        yield from self._of_stage("stage_one", "preview", request, work_dir=work_dir, on_progress=on_progress)

    def _of_stage(
        self, stage: Part, make: Literal["preview", "stream"], request: GenerationRequest, **options: Any
    ) -> Generator[FinishedFrames, None, None]:
        """Hand out what one stage makes, and give back what it took."""
        try:
            yield from self._made(stage, make, request, **options)
        finally:
            _give_back()

    def _made(
        self, stage: Part, make: Literal["preview", "stream"], request: GenerationRequest, **options: Any
    ) -> Generator[FinishedFrames, None, None]:
        pipeline = TwoStagePipeline(self._load(stages=(stage,)))
        with closing(getattr(pipeline, make)(request, **options)) as pieces:
            yield from pieces

    def _holds_stage_one(self, request: GenerationRequest, store: RunStore) -> bool:
        """Return whether Stage I has been run for this request; raise `WorkDirectoryError` if for another."""
        store.claim_motion(request.settings.stage_one_identity() | self._identity(request))
        return store.motion.is_complete and store.has_prompt(self._texts(request))


def _give_back() -> None:
    """Give back what networks took that nothing refers to any more: hooks make circles of them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch since 2.9
        if empty_host_cache is not None:
            empty_host_cache()
    trim_heap()
