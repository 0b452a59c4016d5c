"""Streaming H.264 writer: the video can be watched while it grows, and its final name only ever holds a whole file.

Frames go into a hidden fragmented MP4 beside the target (``.clip.part.mp4``), of which every finished fragment can be
decoded. On a clean exit the packets are copied, without encoding again, into a plain file of the wanted container with
its index in front, and that file takes the final name in one step.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import struct
import tempfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from swifti2v.errors import InvalidInputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from swifti2v.geometry import Size

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""File extensions that can be written, and FFmpeg's name of each container."""

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
"""x264's presets, fastest first."""

_BT709 = 1  # primaries, transfer and matrix have the same number in H.264's tables (ITU-T H.273)
_FRAGMENT_SECONDS = 0.5
_KEYFRAME_SECONDS = 2
# x264's default of 40 frames of lookahead would keep half of an 81-frame clip out of sight of whoever watches it grow.
_LOOKAHEAD_FRAMES = 12
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def check_output_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` if a video can be written there; to be asked before the long work that makes the video.

    Raises:
        OutputError: unknown extension, a folder of that name, no parent folder, or one that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise _not_written(path, f"the extension {path.suffix!r} is not known", f"use {', '.join(CONTAINERS)}")
    if path.is_dir():
        raise _not_written(path, "it is a folder", "give the name of a file")
    if path.exists() and not path.is_file():
        raise _not_written(path, "it is not a regular file", "give another name")
    folder = path.parent
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise _not_written(path, f"{str(folder)!r} {problem}", "create the folder first")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="." + path.stem, suffix=".part" + path.suffix):
            pass
    except OSError as error:
        fix = "make the folder writable or choose another"
        raise _not_written(path, f"no file can be made in {str(folder)!r} ({error.strerror})", fix) from error
    return path


def frame_rate(fps: float) -> Fraction:
    """Return `fps` as the fraction that video files hold: 23.976, 29.97 and 59.94 become multiples of 1000/1001.

    Raises:
        InvalidInputError: not a number between 0 (excluded) and 1000.
    """
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        msg = f"{fps} frames per second cannot be written; use a number above 0 and at most 1000, for instance 24"
        raise InvalidInputError(msg, param="fps", value=fps)
    broadcast = Fraction(math.ceil(fps) * 1000, 1001)
    if abs(broadcast - Fraction(fps)) < Fraction(1, 500):
        return broadcast
    return Fraction(fps).limit_denominator(1000) or Fraction(1, 1000)


class VideoWriter:
    """Context manager that encodes frames as they come: H.264, yuv420p, BT.709, tagged as such.

    Args:
        path: final file; its extension picks the container (`CONTAINERS`).
        size: width and height of every frame; both even.
        fps: frames per second (see `frame_rate`).
        crf: x264's constant quality, 0 (lossless) to 51; 16 cannot be told from the frames by eye.
        preset: x264's trade of speed against file size, one of `PRESETS`.
        num_threads: encoder threads, which add latency as they grow in number; encoding happens inside `write`.
        keep_partial: on an exception, keep what was written as ``<stem>.partial.mp4``.

    Attributes:
        part_path: the growing file, to be watched while the writer is open.
        partial_path: where the frames of an interrupted run were kept, or None.
        num_frames: frames written so far.

    Raises:
        InvalidInputError: an odd size, a bad rate, quality or preset; from `write`, frames of another shape or type.
        OutputError: the file cannot be written; nothing is then found under the final name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: Size,
        fps: float,
        crf: int = 16,
        preset: str = "medium",
        num_threads: int = 2,
        keep_partial: bool = True,
    ) -> None:
        if min(size) < 2 or size.width % 2 or size.height % 2:
            msg = f"size {size} cannot be written as yuv420p; use an even width and height"
            raise InvalidInputError(msg, param="size", value=size)
        if not 0 <= crf <= 51:
            msg = f"quality (crf) {crf} does not exist; use 0 (lossless) to 51, 16 by default"
            raise InvalidInputError(msg, param="crf", value=crf)
        if preset not in PRESETS:
            msg = f"x264 has no preset {preset!r}; use one of {', '.join(PRESETS)}"
            raise InvalidInputError(msg, param="preset", value=preset)
        self.path = check_output_path(path)
        self.part_path = self.path.with_name(f".{self.path.stem}.part.mp4")
        self.partial_path: Path | None = None
        self.num_frames = 0
        self._size = size
        self._rate = frame_rate(fps)
        self._options = {"crf": str(crf), "preset": preset}
        self._num_threads = num_threads
        self._keep_partial = keep_partial
        self._reformatter = VideoReformatter()
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        """Create the part file; one that an earlier run left behind is replaced."""
        with self._reporting_errors():
            self.part_path.unlink(missing_ok=True)
            self._container = av.open(str(self.part_path), "w", format="mp4", options=_fragments())
            self._stream = self._add_stream()
        return self

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Encode `frames`, uint8 RGB [f, H, W, 3] on any device; f may be 0."""
        if self._container is None:
            msg = "the video writer is not open; use it in a with statement"
            raise InvalidInputError(msg)
        for pixels in self._checked(frames):
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SCALING,
            )
            frame.pts = self.num_frames
            frame.time_base = 1 / self._rate
            with self._reporting_errors():
                self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the file and give it its name; after an exception, keep the part file as the partial result."""
        if error_type is not None:
            with contextlib.suppress(OSError, FFmpegError):
                self._close()
            self._keep_or_remove()
            return
        try:
            with self._reporting_errors():
                self._close()
                self._finish()
        except BaseException:
            self._keep_or_remove()
            raise

    def _add_stream(self) -> Any:
        keyframes = max(1, round(self._rate * _KEYFRAME_SECONDS))
        # mbtree off: it reads memory that nobody wrote at some sizes, and equal frames then give unequal files.
        parameters = f"keyint={keyframes}:rc-lookahead={_LOOKAHEAD_FRAMES}:sync-lookahead=0:mbtree=0"
        stream = self._container.add_stream(
            "libx264", rate=self._rate, options={**self._options, "x264-params": parameters}
        )
        stream.width, stream.height, stream.pix_fmt = self._size.width, self._size.height, "yuv420p"
        context = stream.codec_context
        context.color_range = int(ColorRange.MPEG)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.thread_count = self._num_threads
        return stream

    def _checked(self, frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
        array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
        expected = (self._size.height, self._size.width, 3)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != expected:
            msg = (
                f"frames are {array.dtype} {list(array.shape)}; "
                f"this video takes uint8 [frames, {self._size.height}, {self._size.width}, 3]"
            )
            raise InvalidInputError(msg)
        return array

    def _close(self) -> None:
        """Push out what the encoder holds and close the part file."""
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if self.num_frames:
                container.mux(self._stream.encode(None))
        finally:
            container.close()

    def _finish(self) -> None:
        if not self.num_frames:
            raise _not_written(self.path, "it would have no frames", "write at least one")
        whole = self.path.with_name(f".{self.path.stem}.whole{self.path.suffix}")
        try:
            copied = _copy_packets(self.part_path, whole, CONTAINERS[self.path.suffix.lower()])
            if copied != self.num_frames:
                problem = f"only {copied} of {self.num_frames} frames reached the disk"
                raise _not_written(self.path, problem, "check the disk and run again")
            with whole.open("rb+") as file:
                os.fsync(file.fileno())
            whole.replace(self.path)
        finally:
            whole.unlink(missing_ok=True)
        self.part_path.unlink(missing_ok=True)

    def _keep_or_remove(self) -> None:
        partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
        with contextlib.suppress(OSError):
            if self._keep_partial and _cut_to_whole_fragments(self.part_path):
                self.part_path.replace(partial)
                self.partial_path = partial
            self.part_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except (OSError, FFmpegError) as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError | FFmpegError) -> OutputError:
        folder = self.path.parent
        if not folder.is_dir():
            return _not_written(self.path, f"the folder {str(folder)!r} has gone", "create it again")
        free_bytes = shutil.disk_usage(folder).free
        # FFmpeg at times reports only a consequence of the full disk.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or free_bytes < 1 << 20:
            problem = f"the disk is full ({free_bytes / 1e6:.1f} MB free in {str(folder)!r})"
            return _not_written(self.path, problem, "free space there or choose another folder")
        return _not_written(self.path, str(error.strerror or error), "check the folder and the disk")


def _fragments() -> dict[str, str]:
    """Options of FFmpeg's muxers for a file that is readable up to its last fragment."""
    return {
        "movflags": "+delay_moov+default_base_moof",
        "frag_duration": str(int(_FRAGMENT_SECONDS * 1e6)),
        "flush_packets": "1",
    }


def _not_written(path: Path, problem: str, fix: str) -> OutputError:
    return OutputError(f"video {str(path)!r} cannot be written: {problem}; {fix}")


def _copy_packets(source: Path, target: Path, container: str) -> int:
    """Copy the video of `source` into a plain file with the index in front; return the number of frames."""
    copied = 0
    with av.open(str(source)) as reader:
        video = reader.streams.video[0]
        # In the default of milliseconds the duration would be rounded.
        index = {"movflags": "+faststart", "movie_timescale": str(video.time_base.denominator)}
        options = {} if container == "matroska" else index
        with av.open(str(target), "w", format=container, options=options) as writer:
            stream = writer.add_stream_from_template(video)
            for packet in reader.demux(video):
                if packet.dts is None:  # the empty packet that ends the stream
                    continue
                packet.stream = stream
                writer.mux(packet)
                copied += 1
    return copied


def _cut_to_whole_fragments(path: Path) -> bool:
    """Cut off a last fragment that a full disk left unfinished; tell whether a playable video remains.

    The file is a chain of boxes, each with its length in front; ``moof`` (index) and ``mdat`` (data) make a fragment.
    """
    end = position = 0
    with path.open("rb+") as file:
        total = file.seek(0, os.SEEK_END)
        while position + 8 <= total:
            file.seek(position)
            length, name = struct.unpack(">I4s", file.read(8))
            if length == 1:  # the length proper follows, in 64 bits
                (length,) = struct.unpack(">Q", file.read(8).ljust(8, b"\xff"))
            position += max(length, 8)
            if name == b"mdat" and position <= total:
                end = position
        file.truncate(end)
    return end > 0
