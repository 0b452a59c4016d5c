"""From the name of a checkpoint to the loaded parts of a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from swifti2v.geometry import Size, reduced_size
from swifti2v.models.checkpoints import (
    load_stage_one_pipeline,
    load_stage_two_transformer,
    load_stage_two_vae,
    resolve,
)
from swifti2v.models.vae import open_codec
from swifti2v.pipelines.options import GenerationSettings
from swifti2v.pipelines.stage_one import FEW_STEP_ADAPTER, StageOne
from swifti2v.pipelines.stage_two import StageTwo

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.models.checkpoint_index import CheckpointIndex, StageOneEntry


@dataclass(frozen=True)
class Parts:
    """What a checkpoint gives a pipeline.

    Args:
        name: of the checkpoint.
        stage_one, stage_two: loaded.
        defaults: settings that the checkpoint recommends.
        motion_reduction: output size over motion size.
        motion_max_area: pixels of a motion frame at most, None for no limit.
        few_step_fused: the few-step adapters are in the weights, so that the many-step way needs another load.
        device: where hybrid reference and Stage II work.
    """

    name: str
    stage_one: StageOne
    stage_two: StageTwo
    defaults: GenerationSettings
    motion_reduction: float = 4.0
    motion_max_area: int | None = None
    few_step_fused: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def motion_size(self, size: Size) -> Size:
        """Return the size of the motion reference of an output of `size` (640x352 of 2560x1408 for Wan2.2)."""
        factor = self.motion_reduction
        if self.motion_max_area is not None:
            factor = max(factor, math.sqrt(size.width * size.height / self.motion_max_area))
        return reduced_size(size, factor, self.stage_one.geometry.size_multiple)


def load_parts(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    few_step: bool = True,
) -> Parts:
    """Load both stages; arguments as in `TwoStagePipeline.from_pretrained`.

    Raises:
        CheckpointError: the checkpoint cannot be found, downloaded or read.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    checkpoint = resolve(name_or_path, revision=revision, local_files_only=local_files_only)
    index = checkpoint.index
    roles = {adapter.role for adapter in index.stage_one.adapters}
    applied = roles if few_step else roles - {FEW_STEP_ADAPTER}
    pipeline = load_stage_one_pipeline(checkpoint, dtype=dtype, roles=applied).to(place)
    transformer = load_stage_two_transformer(
        checkpoint, dtype=dtype, refiner=None if index.stage_two.refiner != "none" else "training-free"
    )
    codec = load_stage_two_vae(checkpoint, dtype=dtype)
    return Parts(
        name=index.name,
        stage_one=StageOne(
            pipeline,
            window_frames=index.stage_one.window_frames,
            max_sequence_length=index.stage_one.max_sequence_length,
        ),
        stage_two=StageTwo(
            transformer.to(place).eval(), open_codec(codec.to(place).eval()), uses_prompt=index.stage_two.uses_prompt
        ),
        defaults=default_settings(index, few_step=few_step),
        motion_reduction=index.stage_one.reference_reduction,
        motion_max_area=index.stage_one.max_area,
        few_step_fused=FEW_STEP_ADAPTER in applied,
        device=place,
    )


def default_settings(index: CheckpointIndex, *, few_step: bool = True) -> GenerationSettings:
    """Return the settings that an index recommends."""
    one, two, run = index.stage_one, index.stage_two, index.defaults
    steps, guidance = _stage_one_sampling(one, few_step=few_step)
    return GenerationSettings(
        size=Size(run.width, run.height),
        num_frames=run.num_frames,
        fps=run.fps,
        reference=run.reference,
        refiner=two.refiner,
        num_inference_steps=two.num_inference_steps,
        sigma_start=two.sigma_start,
        flow_shift=two.flow_shift,
        guidance_scale=two.guidance_scale,
        segment_size=two.segment_size,
        neighbors_before=two.neighbors_before,
        neighbors_after=two.neighbors_after,
        positions=two.positions,
        few_step=few_step,
        stage_one_steps=steps,
        stage_one_guidance_scale=guidance,
    )


def _stage_one_sampling(entry: StageOneEntry, *, few_step: bool) -> tuple[int, float]:
    if few_step:
        return len(entry.few_step_sigmas), 1.0
    return entry.num_inference_steps, entry.guidance_scale
