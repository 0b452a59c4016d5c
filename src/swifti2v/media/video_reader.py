"""Streaming reader of video files: upright uint8 RGB frames, chunk by chunk, at the file's rate or at another.

Damage is not passed over: a file that ends before its own header says, or whose data cannot be decoded, is a
`VideoInputError` at that point of the iteration, after the good frames before it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A closed list: FFmpeg would also open text files, pictures, and playlists that name other files.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,nut,ivf,h264,hevc,gif,yuv4mpegpipe"
_BT709, _UNSPECIFIED = 1, 2  # ITU-T H.273
_HD_HEIGHT = 720  # untagged video is BT.709 from here on and BT.601 below, as players take it
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# A header may promise this much more than is there before the file counts as truncated (muxers round and pad).
_MISSING_SECONDS = 0.5


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says.

    Args:
        size: width and height as displayed: upright, square pixels.
        fps: mean frames per second.
        num_frames: number of frames, or None where the header has none (`VideoReader.count_frames` decodes them).
    """

    size: Size
    fps: float
    num_frames: int | None


class VideoReader:
    """Iterable over the frames of a video file; every iteration reads the file anew, one chunk in memory at a time.

    Args:
        path: the file.
        fps: resample in time to this rate (the nearest frame is taken); None keeps every frame as stored.
        max_frames: stop after this many frames.
        chunk_frames: frames per chunk when iterated directly.

    Attributes:
        info: what the header says, before `fps` and `max_frames`.

    Raises:
        VideoInputError: the file is missing, empty, not a video, without a video stream; during iteration: truncated
            or damaged.
        InvalidInputError: a rate, limit or chunk length that is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        chunk_frames: int = 16,
    ) -> None:
        for name, value in (("fps", fps), ("max_frames", max_frames), ("chunk_frames", chunk_frames)):
            if value is not None and not (math.isfinite(value) and value > 0):
                msg = f"{name} is {value}; use a number above 0"
                raise InvalidInputError(msg, param=name, value=value)
        self.path = Path(path)
        self._interval = None if fps is None else 1 / Fraction(fps).limit_denominator(100_000)
        self._max_frames = max_frames
        self._chunk_frames = chunk_frames
        self._counted: int | None = None
        _check_file(self.path)
        with self._opened() as container:
            self.info = self._read_info(container)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield chunks uint8 RGB [n, H, W, 3] of `chunk_frames` frames; the last may be shorter."""
        chunk: list[NDArray[np.uint8]] = []
        for frame in self.frames():
            chunk.append(frame)
            if len(chunk) == self._chunk_frames:
                yield np.stack(chunk)
                chunk = []
        if chunk:
            yield np.stack(chunk)

    def frames(self) -> Generator[NDArray[np.uint8], None, None]:
        """Yield single frames, uint8 RGB [H, W, 3]."""
        reformatter = VideoReformatter()
        pixels = None
        last = None
        for frame in self._selected():
            if pixels is None or frame is not last:  # a repeated frame is converted once
                pixels = _to_rgb(reformatter, frame, self.info.size)
                last = frame
            yield pixels

    def count_frames(self) -> int:
        """Return the number of frames that iteration yields, by decoding the file once."""
        if self._counted is None:
            self._counted = sum(1 for _ in self._selected())
        return self._counted

    def _selected(self) -> Iterator[Any]:
        with self._opened() as container:
            decoded = self._decoded(container)
            frames = decoded if self._interval is None else _nearest(_timed(decoded, self.info.fps), self._interval)
            for count, frame in enumerate(frames, start=1):
                yield frame
                if count == self._max_frames:
                    return

    def _decoded(self, container: Any) -> Iterator[Any]:
        """Yield decoded frames; raise `VideoInputError` where the data is damaged or ends too early."""
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count, end = 0, 0.0
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise _unusable(self.path, f"is damaged after {count} frames", "copy or export it again")
                for frame in packet.decode():
                    count += 1
                    end = max(end, (frame.time or 0.0) + 1 / self.info.fps)
                    yield frame
        except (OSError, FFmpegError) as error:
            problem = f"is truncated or damaged after {count} frames ({error.strerror})"
            raise _unusable(self.path, problem, "copy or export it again") from error
        promised = _promised_seconds(container, stream)
        if count == 0 or (promised is not None and end < promised - max(_MISSING_SECONDS, 2 / self.info.fps)):
            said = "" if promised is None else f" of {promised:.1f}"
            raise _unusable(
                self.path, f"is truncated: it ends after {end:.1f}{said} seconds", "copy or export it again"
            )

    def _opened(self) -> Any:
        try:
            return av.open(str(self.path), options={"format_whitelist": _FORMATS}, metadata_errors="replace")
        except (OSError, FFmpegError) as error:
            problem = f"is not a readable video, or is truncated ({error.strerror})"
            raise _unusable(self.path, problem, "give an MP4, MOV, WebM, MKV, AVI or GIF file") from error

    def _read_info(self, container: Any) -> VideoInfo:
        if not len(container.streams):
            raise _unusable(self.path, "is truncated: its index is not whole", "copy or export it again")
        if not container.streams.video:
            raise _unusable(self.path, "has no video stream", "give a file that holds pictures, not only sound")
        stream = container.streams.video[0]
        try:
            first = next(container.decode(stream), None)
        except (OSError, FFmpegError) as error:
            raise _unusable(self.path, f"cannot be decoded ({error.strerror})", "convert it to H.264 MP4") from error
        if first is None:
            raise _unusable(self.path, "has no frames", "copy or export it again")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        width, height = max(1, round(first.width * aspect)), first.height
        if first.rotation % 180:
            width, height = height, width
        return VideoInfo(Size(width, height), float(rate), stream.frames or None)


def _unusable(path: Path, problem: str, fix: str) -> VideoInputError:
    return VideoInputError(f"video {str(path)!r} {problem}; {fix}")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise _unusable(path, "is a folder", "give the path of a video file")
    if not path.is_file():
        raise _unusable(path, "does not exist", "check the path")
    if not path.stat().st_size:
        raise _unusable(path, "is empty (zero bytes)", "copy or export it again")


def _promised_seconds(container: Any, stream: Any) -> float | None:
    """Duration from the header; the container's may be that of a longer sound track, so the stream's goes first."""
    if stream.duration is not None:
        start = stream.start_time or 0
        return float((start + stream.duration) * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration / 1_000_000)
    return None


def _timed(frames: Iterable[Any], fps: float) -> Iterator[tuple[Fraction, Any]]:
    """Pair frames with their times in seconds from the first; frames without a time stamp follow at the mean rate."""
    start: Fraction | None = None
    for index, frame in enumerate(frames):
        time = Fraction(index) / Fraction(fps) if frame.pts is None else frame.pts * frame.time_base
        start = time if start is None else start
        yield time - start, frame


def _nearest(timed: Iterable[tuple[Fraction, Any]], interval: Fraction) -> Iterator[Any]:
    """Yield the frame nearest to each multiple of `interval`; the last frame holds as long as the one before it."""

    def closed() -> Iterator[tuple[Fraction, Any]]:
        previous = before = None
        for entry in timed:
            previous, before = entry, previous
            yield entry
        if previous is not None:
            duration = previous[0] - before[0] if before is not None else interval
            yield previous[0] + duration, previous[1]

    due = Fraction(0)
    for (time, frame), (next_time, _) in pairwise(closed()):
        while due < (time + next_time) / 2:
            yield frame
            due += interval


def _to_rgb(reformatter: Any, frame: Any, size: Size) -> NDArray[np.uint8]:
    """Convert a decoded frame to upright RGB, uint8 [H, W, 3], by the matrix that its tags or its size tell."""
    width, height = (size.height, size.width) if frame.rotation % 180 else size
    untagged = frame.colorspace == _UNSPECIFIED
    matrix = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    converted = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=matrix if untagged else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALING,
    )
    pixels: NDArray[np.uint8] = converted.to_ndarray()
    # `rotation` counts degrees anticlockwise from the stored picture to the upright one, as rot90 does.
    turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(turned)
