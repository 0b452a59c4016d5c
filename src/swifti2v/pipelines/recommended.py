"""The settings that a checkpoint recommends, from its index. Pure Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swifti2v.geometry import Size
from swifti2v.runner.options import GenerationSettings

if TYPE_CHECKING:
    from swifti2v.wan.checkpoint_index import CheckpointIndex, StageOneEntry


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
        solver=two.solver,
        guidance_scale=two.guidance_scale,
        segment_size=two.segment_size,
        neighbors_before=two.neighbors_before,
        neighbors_after=two.neighbors_after,
        positions=two.positions,
        few_step=few_step,
        stage_one_steps=steps,
        stage_one_guidance_scale=guidance,
        stage_one_flow_shift=one.flow_shift,
        negative_prompt=one.negative_prompt,
    )


def _stage_one_sampling(entry: StageOneEntry, *, few_step: bool) -> tuple[int, float]:
    if few_step:
        return len(entry.few_step_sigmas), 1.0
    return entry.num_inference_steps, entry.guidance_scale
