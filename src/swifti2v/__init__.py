"""SwiftI2V: one image and a prompt become a high-resolution video, in two stages and by segments (arXiv 2605.06356).

The names below are the public interface; `tests/test_exported_members.py` pins them. What needs torch is imported at
its first use (PEP 562), so that ``import swifti2v`` and ``swifti2v --help`` stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swifti2v.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    DeviceLostError,
    GenerationCancelled,
    ImageInputError,
    InvalidInputError,
    JobError,
    LatentCacheError,
    MemoryBudgetError,
    OutputError,
    QueueFullError,
    SwiftI2VError,
    TrainingError,
    VideoInputError,
    WorkDirectoryError,
)
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from swifti2v.runner.refine import VideoRefiner
    from swifti2v.runner.two_stage import TwoStagePipeline
    from swifti2v.runs import Video
    from swifti2v.settings import GenerationSettings
    from swifti2v.wan.transformer import StageTwoTransformer

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigurationError",
    "DeviceLostError",
    "GenerationCancelled",
    "GenerationSettings",
    "ImageInputError",
    "InvalidInputError",
    "JobError",
    "LatentCacheError",
    "MemoryBudgetError",
    "OutputError",
    "QueueFullError",
    "Size",
    "StageTwoTransformer",
    "SwiftI2VError",
    "TrainingError",
    "TwoStagePipeline",
    "Video",
    "VideoInputError",
    "VideoRefiner",
    "WorkDirectoryError",
    "__version__",
]

_LAZY = {
    "GenerationSettings": "swifti2v.settings",
    "StageTwoTransformer": "swifti2v.wan.transformer",
    "TwoStagePipeline": "swifti2v.runner.two_stage",
    "Video": "swifti2v.runs",
    "VideoRefiner": "swifti2v.runner.refine",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _LAZY:
        msg = f"module 'swifti2v' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(__all__)
