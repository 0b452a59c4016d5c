"""What of a run its cost depends on; alone here, for the command line shows its defaults without planning anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swifti2v.geometry import Size


@dataclass(frozen=True)
class RunSettings:
    """What of a run's options its cost depends on; the names and defaults are those of generation."""

    size: Size
    num_frames: int = 81
    stage_one_steps: int = 4
    stage_one_guidance_scale: float = 1.0
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    segment_size: int = 3
    neighbors_before: int = 1
    neighbors_after: int = 0
    keep_context: bool = False
