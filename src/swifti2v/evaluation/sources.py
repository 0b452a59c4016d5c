"""Where the frames of an evaluation come from: files, read by time and fitted to one size, and the still control.

What a file needs before it can be judged beside another is done and said in `FrameSource.notes`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image

from swifti2v.errors import VideoInputError
from swifti2v.geometry import Size
from swifti2v.media.images import fit_image, fit_notes
from swifti2v.media.video_reader import VideoReader

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, Any]

HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273, transfer characteristics
# Time stamps are rounded (Matroska: to milliseconds), so intervals of one rate differ a little.
UNEVEN_SHARE = 0.25
SAME_RATE = 0.01


@dataclass(frozen=True)
class FrameSource:
    """A video as it is judged.

    Args:
        label: short name.
        size: of every frame that `frames` yields.
        fps: frames per second.
        frames: gives uint8 RGB [H, W, 3] from frame 0 on, anew at each call; raises `VideoInputError` where a file is
            damaged. A frame that is the very array of the one before is not measured anew.
        path: of the file; None for a control.
        num_frames: if it is known beforehand, to show progress.
        notes: what was adapted, a sentence each.
    """

    label: str
    size: Size
    fps: float
    frames: Callable[[], Generator[Array]]
    path: str | None = None
    num_frames: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stream:
    """What the file says that frames alone do not."""

    bits: int
    transfer: int
    has_sound: bool
    uneven: bool


def open_video(path: Path, *, label: str, size: Size | None = None, fps: float | None = None) -> FrameSource:
    """Open a video file to be judged.

    Frames of another size than `size` are cut to its aspect about their center and resampled, as an input image is.
    A variable frame rate is read by time at its mean rate.

    Args:
        path: of the file.
        label: short name.
        size: to be judged at; None keeps the file's.
        fps: read by time at this rate if the file's differs; None keeps the file's.

    Raises:
        VideoInputError: the file is missing, not a video, or truncated in its header; later, of the frames: damaged.
    """
    reader = VideoReader(path)
    info, stream = reader.info, _inspect(path)
    notes = _stream_notes(stream)
    num_frames = info.num_frames
    rate = info.fps
    if fps is not None and abs(fps / info.fps - 1) > SAME_RATE:
        notes.append(f"read by time at {fps:g} frames per second; the file has {info.fps:g}")
        rate = fps
    elif stream.uneven:
        notes.append(f"its frame rate varies; read by time at its mean rate of {info.fps:g} frames per second")
    if rate != info.fps or stream.uneven:
        num_frames = None
        reader = VideoReader(path, fps=rate)
    target = size or info.size
    if target != info.size:
        enlarged = "enlarged" if target.width > info.size.width else "reduced"
        notes.append(f"{enlarged} from {info.size} to {target} to be judged at one size")
        notes += fit_notes(Image.new("L", info.size), target)

    def frames() -> Generator[Array]:
        for frame in reader.frames():
            yield fitted(frame, target)

    return FrameSource(label, target, rate, frames, path=str(path), num_frames=num_frames, notes=tuple(notes))


def open_truth(path: Path, *, size: Size, fps: float) -> FrameSource:
    """Open the true video at the size and rate of the judged one.

    Raises:
        VideoInputError: as `open_video`, and if the truth would have to be enlarged: it then lacks the very detail that
            it is to be the measure of.
    """
    own = VideoReader(path).info.size
    if own.width < size.width or own.height < size.height:
        msg = f"truth {str(path)!r} is {own}, smaller than the video ({size}); give one of at least that size"
        raise VideoInputError(msg)
    return open_video(path, label="truth", size=size, fps=fps)


def still_video(picture: Array, *, label: str, fps: float, num_frames: int, notes: tuple[str, ...]) -> FrameSource:
    """Return the control that repeats one picture, uint8 RGB [H, W, 3]."""

    def frames() -> Generator[Array]:
        yield from itertools.repeat(picture, num_frames)

    size = Size(picture.shape[1], picture.shape[0])
    return FrameSource(label, size, fps, frames, num_frames=num_frames, notes=notes)


def first_frame(source: FrameSource) -> Array:
    """Return frame 0, uint8 RGB [H, W, 3]; raise `VideoInputError` if the file is damaged there."""
    with closing(source.frames()) as frames:
        return next(frames)


def fitted(frame: Array, size: Size) -> Array:
    """Return a frame, uint8 RGB [H, W, 3], cut to the aspect of `size` about its center and resampled (Lanczos)."""
    if frame.shape[1::-1] == tuple(size):
        return frame
    return np.asarray(fit_image(Image.fromarray(frame), size))


def _inspect(path: Path) -> _Stream:
    """Read what the header and the time stamps say; nothing is decoded.

    `VideoReader` has opened the file before: FFmpeg finds the same format again, which is one of the reader's.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            bits = max((part.bits for part in context.format.components), default=8) if context.format else 8
            has_sound = bool(container.streams.audio)
            transfer = int(context.color_trc or 0)
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    except (OSError, av.FFmpegError):
        # Damage is the reader's to report, with the number of good frames.
        return _Stream(8, 0, has_sound=False, uneven=False)
    return _Stream(bits, transfer, has_sound, uneven=_is_uneven(times))


def _is_uneven(times: list[int]) -> bool:
    """Whether intervals differ from their median by more than rounding does."""
    intervals = [after - before for before, after in itertools.pairwise(times)]
    if len(intervals) < 2:
        return False
    usual = statistics.median(intervals)
    return any(abs(interval - usual) > max(2, UNEVEN_SHARE * usual) for interval in intervals)


def _stream_notes(stream: _Stream) -> list[str]:
    notes = []
    if stream.bits > 8:
        notes.append(f"{stream.bits} bits per channel, converted to 8")
    if stream.transfer in HDR_TRANSFERS:
        notes.append(f"HDR ({HDR_TRANSFERS[stream.transfer]}), judged without tone mapping: values are not comparable")
    if stream.has_sound:
        notes.append("its sound is ignored")
    return notes
