"""What makes the frames of a benchmark's videos: a checkpoint, or the control that repeats the picture."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from swifti2v.settings import GenerationSettings

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import numpy as np
    from torch import Tensor

    from swifti2v.evaluation.vbench.clips import Clip
    from swifti2v.geometry import Size
    from swifti2v.runner.two_stage import TwoStagePipeline

STILL_MODEL = "still"
"""Name of the control in place of a checkpoint's."""


class ClipShape(NamedTuple):
    """What every video of a run is like."""

    size: Size
    num_frames: int
    fps: float


class ClipMaker(Protocol):
    """Makes the frames of videos."""

    @property
    def shape(self) -> ClipShape:
        """Size, frames and rate of every video."""

    def identity(self) -> Mapping[str, Any]:
        """Return what decides the videos besides picture, prompt and seed, as plain values."""

    def frames(self, clip: Clip) -> Generator[Tensor | np.ndarray[Any, Any], None, None]:
        """Yield uint8 [n,H,W,3], from the first frame on."""


@dataclass(frozen=True)
class MakerSettings:
    """What a process has to know to make videos; plain values, to be sent to other processes.

    Args:
        model: name or path of a checkpoint, or `still`.
        size: of the suite.
        choices: fields of `GenerationSettings`, for every video; without size and seed.
        device: of the checkpoint, None for a card if there is one.
        few_step: see `TwoStagePipeline.from_pretrained`.
    """

    model: str
    size: Size
    choices: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    few_step: bool = True

    def open(self) -> ClipMaker:
        """Load the model; raise `CheckpointError` or `InvalidInputError` as the pipeline does."""
        if self.model == STILL_MODEL:
            num_frames = self.choices.get("num_frames") or GenerationSettings.num_frames
            return StillMaker(ClipShape(self.size, num_frames, self.choices.get("fps") or GenerationSettings.fps))
        from swifti2v.runner.two_stage import TwoStagePipeline

        pipeline = TwoStagePipeline.from_pretrained(self.model, device=self.device, few_step=self.few_step)
        return PipelineMaker(pipeline, self.choices, size=self.size)


class PipelineMaker:
    """Videos of a checkpoint.

    Args:
        pipeline: loaded.
        choices: of every video; the size is put in from `size`, the seed from the clip.
        size: of the suite.
    """

    def __init__(self, pipeline: TwoStagePipeline, choices: Mapping[str, Any], *, size: Size) -> None:
        self._pipeline = pipeline
        self._choices = {**choices, "size": size}
        self._settings = pipeline.defaults.settled(self._choices)

    @property
    def shape(self) -> ClipShape:
        """Size, frames and rate of every video."""
        return ClipShape(self._settings.size, self._settings.num_frames, self._settings.fps)

    def identity(self) -> Mapping[str, Any]:
        """Return checkpoint and settings."""
        settings = {name: str(value) for name, value in asdict(self._settings).items() if name != "seed"}
        return {"model": self._pipeline.parts.name, **settings, "size": str(self._settings.size)}

    def frames(self, clip: Clip) -> Generator[Tensor, None, None]:
        """Yield frames as segments finish."""
        request = self._pipeline.request(clip.image, clip.prompt, **{**self._choices, "seed": clip.seed})
        with closing(self._pipeline.stream(request)) as pieces:
            for piece in pieces:
                yield piece.frames


class StillMaker:
    """The control that every table needs: the picture repeated. Scores near 1 wherever stillness counts as likeness."""

    def __init__(self, shape: ClipShape) -> None:
        self.shape = shape

    def identity(self) -> Mapping[str, Any]:
        """Return what makes it: nothing but its shape."""
        size, num_frames, fps = self.shape
        return {"model": STILL_MODEL, "size": str(size), "num_frames": str(num_frames), "fps": str(fps)}

    def frames(self, clip: Clip) -> Generator[np.ndarray[Any, Any], None, None]:
        """Yield the picture, a frame at a time."""
        import numpy as np

        from swifti2v.media.images import fit_image, load_image

        picture = np.asarray(fit_image(load_image(clip.image).image, self.shape.size))[None]
        for _ in range(self.shape.num_frames):
            yield picture
