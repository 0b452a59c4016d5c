"""Whether the host has room for both stages of a checkpoint, or for one at a time only (decision 0007)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.plan import plan_stages
from swifti2v.runner.fitting import ASSUMED_RATES, networks_of
from swifti2v.wan.checkpoints import PARTS
from swifti2v.wan.quantized_linear import storages_of

if TYPE_CHECKING:
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings


def stages_fit_together(parts: Parts, settings: GenerationSettings) -> bool:
    """Return whether the limits of memory have room for both stages with their weights as they are.

    Args:
        parts: both stages, loaded or described.
        settings: of the run.

    Raises:
        MemoryBudgetError: not even one stage at a time fits.
    """
    limits = parts.memory or MemoryLimits()
    if limits.host_bytes is None:
        return True
    plans = plan_stages(
        replace(networks_of(parts), stages=PARTS, quantization=parts.quantization),
        replace(settings, keep_context=parts.stage_two.keeps_context(settings)),
        ASSUMED_RATES,
        budget_bytes=limits.device_bytes,
        host_bytes=limits.host_bytes,
        storages=storages_of(parts.stage_two.transformer.dtype),
    )
    return len(plans) == 1
