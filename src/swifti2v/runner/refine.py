"""Bring your own motion: any video and the photo it was made from -> the same video with the photo's detail.

Stage II without Stage I: the video is the motion reference. `light` needs no checkpoint, so neither does this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.media.images import as_loaded_image, image_to_tensor
from swifti2v.media.video_reader import VideoReader
from swifti2v.reference.alignment import align
from swifti2v.runner.loading import open_device
from swifti2v.runs import FinishedFrames, Progress, Video
from swifti2v.stage_two_light import refine_by_light
from swifti2v.work_directory import WorkDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.reference.alignment import Alignment, Pixels
    from swifti2v.runs import OnProgress

LARGEST_DEFAULT_AREA = 2560 * 1408
"""Pixels of a frame at most where no size is asked for."""


@dataclass(frozen=True)
class RefineRequest:
    """One video to refine, checked.

    Args:
        motion: the video file.
        crop: left, upper, right and lower edge in pixels of the video that the output shows.
        image: RGB, of `work_size`: what frame 0 shows, from the photo.
        alignment: how photo and frame 0 belong together.
        size: of the output.
        work_size: at which it is made, multiples of 32 that hold `size`.
        num_frames: of the output.
        fps: frames per second of the output.
        notes: what was found, a sentence each.
    """

    motion: Path
    crop: tuple[int, int, int, int]
    image: PIL.Image.Image
    alignment: Alignment
    size: Size
    work_size: Size
    num_frames: int
    fps: float
    notes: tuple[str, ...] = ()


class VideoRefiner:
    """Refines videos by `light`.

    ```python
    video = VideoRefiner()("motion.mp4", "photo.jpg")
    video.save("refined.mp4")
    ```

    Args:
        device: where to work; None: the CUDA device if there is one, else the CPU.

    Raises:
        InvalidInputError: there is no such device.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = open_device(device)

    def __call__(
        self,
        motion: str | Path,
        image: PIL.Image.Image | str | Path,
        *,
        size: Size | tuple[int, int] | str | None = None,
        max_frames: int | None = None,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Video:
        """Refine a video and hold all of it in memory; arguments as in `request` and `stream`."""
        request = self.request(motion, image, size=size, max_frames=max_frames)
        with closing(self.stream(request, work_dir=work_dir, on_progress=on_progress)) as pieces:
            frames = torch.cat([piece.frames for piece in pieces])
        return Video(frames, request.fps, request.notes)

    def request(
        self,
        motion: str | Path,
        image: PIL.Image.Image | str | Path,
        *,
        size: Size | tuple[int, int] | str | None = None,
        max_frames: int | None = None,
    ) -> RefineRequest:
        """Check video and photo, and find how they belong together.

        Args:
            motion: a video file of any model, size, rate and length; its first frame shows the photo, or a part of it.
            image: the photo that the video was made from, as a PIL image or a path.
            size: of the output; None: that of the photo's part in the video, at most `LARGEST_DEFAULT_AREA` pixels.
            max_frames: use no more of the video.

        Raises:
            VideoInputError, ImageInputError: a file cannot be read.
            InvalidInputError: the photo does not belong to the video, or the size cannot be made.
        """
        reader = VideoReader(motion, max_frames=max_frames)
        frames = reader.frames()
        first = next(frames)
        frames.close()
        loaded = as_loaded_image(image)
        alignment = align(np.asarray(loaded.image), first)
        notes = (*loaded.notes, *alignment.notes)
        asked = _default_size(alignment, first) if size is None else Size.of(size)
        multiple = CodecGeometry().size_multiple
        work_size = Size(*(-(-side // multiple) * multiple for side in asked))
        height, width = first.shape[:2]
        if asked.width < width or asked.height < height:
            msg = f"the video has {width}x{height} pixels, more than the output of {asked}; ask for a larger size"
            raise InvalidInputError(msg, param="size", value=asked)
        crop = _crop(width, height, work_size)
        kept = (crop[2] - crop[0]) * (crop[3] - crop[1]) / (width * height)
        if kept < 0.97:
            notes = (*notes, f"cut to the aspect of {asked}: {1 - kept:.0%} of the video is left out")
        num_frames = reader.count_frames()
        fitted = loaded.image.resize(work_size, PIL.Image.Resampling.LANCZOS, box=_in_photo(crop, first, alignment))
        return RefineRequest(
            Path(motion), crop, fitted, alignment, asked, work_size, num_frames, reader.info.fps, notes
        )

    @torch.no_grad()
    def stream(
        self,
        request: RefineRequest,
        *,
        work_dir: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[FinishedFrames, None, None]:
        """Yield frames as they are finished; memory does not grow with the length of the video.

        Args:
            request: from `request`.
            work_dir: keep finished segments there, and continue from what it holds.
            on_progress: see `OnProgress`.

        Raises:
            WorkDirectoryError: while iterating, if `work_dir` belongs to another run or is damaged.
            OutputError: while iterating, if it cannot be written.
        """
        report = on_progress or _ignore
        with WorkDirectory.open(work_dir) as work:
            work.claim_segments(_identity(request))
            image = image_to_tensor(request.image).to(self.device)
            yield from _handed_out(refine_by_light(_motion_frames(request), image, work), request, report)


def _handed_out(
    chunks: Iterator[Tensor], request: RefineRequest, report: Callable[[Progress], None]
) -> Generator[FinishedFrames, None, None]:
    left = (request.work_size.width - request.size.width) // 2
    top = (request.work_size.height - request.size.height) // 2
    done = 0
    for chunk in chunks:
        frames = chunk[: request.num_frames - done, top : top + request.size.height, left : left + request.size.width]
        if not len(frames):
            return
        yield FinishedFrames(done, frames.cpu())
        done += len(frames)
        report(Progress("frames", done, request.num_frames))


def _motion_frames(request: RefineRequest) -> Iterator[Tensor]:
    """Yield the video as a motion reference: cut, in the photo's colors, and filled up to whole latent frames."""
    left, upper, right, lower = request.crop
    pixels: Pixels | None = None
    for pixels in VideoReader(request.motion, max_frames=request.num_frames).frames():
        yield torch.from_numpy(request.alignment.recolored(np.ascontiguousarray(pixels[upper:lower, left:right])))[None]
    geometry = CodecGeometry()
    missing = -(request.num_frames - 1) % geometry.temporal
    if pixels is not None and missing:
        last = request.alignment.recolored(np.ascontiguousarray(pixels[upper:lower, left:right]))
        yield torch.from_numpy(last)[None].expand(missing, -1, -1, -1)


def _default_size(alignment: Alignment, frame: Pixels) -> Size:
    left, upper, right, lower = alignment.box
    height, width = frame.shape[:2]
    area = min((right - left) * (lower - upper), LARGEST_DEFAULT_AREA)
    scale = max(math.sqrt(area / (width * height)), 1.0)
    return Size(2 * round(width * scale / 2), 2 * round(height * scale / 2))


def _crop(width: int, height: int, size: Size) -> tuple[int, int, int, int]:
    """Return the largest part of a frame about its center that has the aspect of `size`, in whole pixels."""
    scale = min(width / size.width, height / size.height)
    columns, rows = min(width, round(size.width * scale)), min(height, round(size.height * scale))
    left, upper = (width - columns) // 2, (height - rows) // 2
    return left, upper, left + columns, upper + rows


def _in_photo(
    crop: tuple[int, int, int, int], frame: Pixels, alignment: Alignment
) -> tuple[float, float, float, float]:
    """Return the edges of a part of the frame in pixels of the photo."""
    left, upper, right, lower = alignment.box
    height, width = frame.shape[:2]
    across, down = (right - left) / width, (lower - upper) / height
    return left + crop[0] * across, upper + crop[1] * down, left + crop[2] * across, upper + crop[3] * down


def _identity(request: RefineRequest) -> dict[str, str]:
    with request.motion.open("rb") as file:
        motion = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "motion": motion,
        "image": hashlib.sha256(request.image.tobytes()).hexdigest(),
        "size": str(request.size),
        "num_frames": str(request.num_frames),
        "refiner": "light",
    }


def _ignore(_progress: Progress) -> None:
    """Report to nobody."""
