"""What goes into a run and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

    from swifti2v.settings import GenerationSettings


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        phase: `stage_one` counts its steps, `stage_two` those of all segments, `frames` the pixel frames handed out.
        done: of `total`.
        segment: of `stage_two`, the segment at work, from 1 to `num_segments`.
        num_segments: of `stage_two`.
    """

    phase: Literal["stage_one", "stage_two", "frames"]
    done: int
    total: int
    segment: int = 0
    num_segments: int = 0


OnProgress = Callable[[Progress], None]
"""Called after every step; raise `GenerationCancelled` in it to cancel. What is finished stays in the
work directory: Stage I as a whole, Stage II segment by segment."""


@dataclass(frozen=True)
class FinishedFrames:
    """Pixel frames that are done: uint8 [n,H,W,3] on the CPU, the first of them frame `first_frame` of the clip."""

    first_frame: int
    frames: Tensor


@dataclass(frozen=True)
class Video:
    """A finished clip.

    Args:
        frames: uint8 [F,H,W,3] on the CPU.
        fps: frames per second.
        notes: what was done to image and prompt on the way ("rotated by its EXIF orientation").
    """

    frames: Tensor
    fps: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> Path:
        """Write H.264 (mp4, mov or mkv, by the name); raise `OutputError` if that is not possible."""
        height, width = self.frames.shape[1:3]
        with VideoWriter(path, size=Size(width, height), fps=self.fps) as writer:
            writer.write(self.frames)
        return Path(path)


@dataclass(frozen=True)
class GenerationRequest:
    """One video to make: an image that fits the settings, a prompt, the settings."""

    image: PIL.Image.Image
    prompt: str
    settings: GenerationSettings
    notes: tuple[str, ...] = ()
