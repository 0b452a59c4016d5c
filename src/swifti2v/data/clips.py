"""Clips of 4k+1 frames: which frames of a scene, at what size, and reading them.

A frame is cut and resampled by `media.images.fit_image`, the function that fits the input image at inference: what
Stage II sees as a first frame in training is what it will be given later, to the bit (`tests/data/test_clips.py`).
Frames are taken by time stamp at the rate of training, so that a variable frame rate does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from swifti2v.data.buckets import covers, nearest_bucket
from swifti2v.data.report import Skipped
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.media.images import fit_image
from swifti2v.media.video_reader import VideoReader

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from swifti2v.data.report import Scene

Extraction = Literal["head", "uniform", "slide"]


@dataclass(frozen=True)
class ClipOptions:
    """Which clips are cut from a scene.

    Args:
        num_frames: of a clip, 4k+1.
        extraction: `head` the first frames; `uniform` `clips_per_scene` clips evenly spread, one being in the middle;
            `slide` a clip every `stride_frames`.
        clips_per_scene: of `uniform`; fewer where the scene has fewer places.
        stride_frames: of `slide`; default: clips follow each other.
    """

    num_frames: int = 81
    extraction: Extraction = "head"
    clips_per_scene: int = 1
    stride_frames: int | None = None

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` for a length that is not 4k+1, or another value that cannot be used."""
        CodecGeometry().latent_frames(self.num_frames)
        if self.extraction not in ("head", "uniform", "slide"):
            msg = f"extraction is {self.extraction!r}; use head, uniform or slide"
            raise InvalidInputError(msg)
        for name, value in (("clips_per_scene", self.clips_per_scene), ("stride_frames", self.stride_frames)):
            if value is not None and value < 1:
                msg = f"{name} is {value}; use 1 or more"
                raise InvalidInputError(msg)


@dataclass(frozen=True)
class ClipRequest:
    """A clip to cut.

    Args:
        name: unique in a data set: the video's and the first frame, ``clip.mp4@120``.
        path: of the video.
        prompt: what it shows.
        first_frame: counted at `fps` from the start of the video.
        num_frames: 4k+1.
        fps: rate of the clip.
        size: of its frames.
    """

    name: str
    path: Path
    prompt: str
    first_frame: int
    num_frames: int
    fps: float
    size: Size

    @property
    def bucket(self) -> str:
        """Clips of one bucket have one shape: ``1280x704x81``."""
        return f"{self.size}x{self.num_frames}"


@dataclass(frozen=True)
class Clip:
    """A clip in memory.

    Args:
        frames: uint8 [F,H,W,3], F = 4k+1.
        fps: frames per second.
        prompt: what it shows.
        name: of its `ClipRequest`.
        bucket: of its `ClipRequest`.
    """

    frames: NDArray[np.uint8]
    fps: float
    prompt: str
    name: str
    bucket: str


@dataclass(frozen=True)
class ClipPlan:
    """The clips of a data set.

    Args:
        requests: in the order of the scenes.
        scenes: those that have clips.
        skipped: those that have none, because they are smaller than their bucket.
    """

    requests: tuple[ClipRequest, ...]
    scenes: tuple[Scene, ...]
    skipped: tuple[Skipped, ...]


def clip_starts(num_frames: int, options: ClipOptions) -> list[int]:
    """Return the first frame of each clip in a scene of `num_frames` frames; none if it is shorter than a clip."""
    last = num_frames - options.num_frames
    if last < 0:
        return []
    if options.extraction == "head":
        return [0]
    if options.extraction == "slide":
        return list(range(0, last + 1, options.stride_frames or options.num_frames))
    count = options.clips_per_scene
    if count == 1:
        return [last // 2]
    return sorted({round(place * last / (count - 1)) for place in range(count)})


def plan_clips(
    scenes: Iterable[Scene], buckets: Sequence[Size], options: ClipOptions, *, fps: float = 16.0
) -> ClipPlan:
    """Say which clips are cut from the scenes of a `Report` at `fps`, its rate, and which scenes have none.

    Raises:
        InvalidInputError: there are no buckets.
    """
    if not buckets:
        msg = "there is no bucket; make them with make_buckets"
        raise InvalidInputError(msg)
    requests: list[ClipRequest] = []
    used: list[Scene] = []
    skipped: list[Skipped] = []
    for scene in scenes:
        bucket = nearest_bucket(scene.size, buckets)
        starts = clip_starts(scene.num_frames, options)
        place = f"{scene.name}[{scene.first_frame}:{scene.first_frame + scene.num_frames}]"
        if not covers(scene.size, bucket):
            detail = f"is {scene.size}, its bucket {bucket}: nothing is enlarged; train at a smaller size"
            skipped.append(Skipped(place, "smaller than its bucket", detail))
        elif not starts:
            detail = f"has {scene.num_frames} frames; a clip has {options.num_frames}"
            skipped.append(Skipped(place, "too short", detail))
        else:
            used.append(scene)
            requests.extend(_requests(scene, starts, bucket, num_frames=options.num_frames, fps=fps))
    return ClipPlan(tuple(requests), tuple(used), tuple(skipped))


def _requests(
    scene: Scene, starts: Sequence[int], bucket: Size, *, num_frames: int, fps: float
) -> Iterator[ClipRequest]:
    for start in starts:
        first = scene.first_frame + start
        name = f"{scene.name}@{first}"
        yield ClipRequest(name, scene.path, scene.prompt, first, num_frames, fps, bucket)


def read_clips(requests: Sequence[ClipRequest]) -> Generator[Clip | Skipped, None, None]:
    """Cut all clips of one video in one pass over it; those that cannot be read come as skipped.

    Frames beside the clips are never kept, so memory holds the clips that are open at a time: one, unless they overlap.

    Args:
        requests: of one file at one rate; any order.
    """
    left = {request.name: request for request in requests}
    try:
        with closing(_cut(requests)) as clips:
            for clip in clips:
                del left[clip.name]
                yield clip
                del clip  # or it would stay in memory while the next is read
    except Exception as error:  # noqa: BLE001 - a file that fails after it was checked costs its clips, never the run
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        reason = "the video ends before the clip does: it changed since it was checked"
    for name in left:
        yield Skipped(name, "damaged", reason)


def _cut(requests: Sequence[ClipRequest]) -> Generator[Clip, None, None]:
    pending = deque(sorted(requests, key=lambda request: request.first_frame))
    being_cut: list[tuple[ClipRequest, NDArray[np.uint8]]] = []
    reader = VideoReader(pending[0].path, fps=pending[0].fps)
    for index, frame in enumerate(reader.frames()):
        while pending and pending[0].first_frame == index:
            request = pending.popleft()
            being_cut.append((request, _empty_frames(request)))
        for request, pixels in being_cut:
            pixels[index - request.first_frame] = fit_frame(frame, request.size)
        for position in reversed(range(len(being_cut))):
            request = being_cut[position][0]
            if index == request.first_frame + request.num_frames - 1:
                yield _clip(*being_cut.pop(position))
        if not pending and not being_cut:
            return


def fit_frame(frame: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Return a frame uint8 [H,W,3] at `size`, as inference fits its input image."""
    return np.asarray(fit_image(Image.fromarray(frame), size), dtype=np.uint8)


def _empty_frames(request: ClipRequest) -> NDArray[np.uint8]:
    return np.empty((request.num_frames, request.size.height, request.size.width, 3), dtype=np.uint8)


def _clip(request: ClipRequest, frames: NDArray[np.uint8]) -> Clip:
    return Clip(frames, request.fps, request.prompt, request.name, request.bucket)
