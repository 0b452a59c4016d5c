"""Small videos written by PyAV directly."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
import pytest

from swifti2v.data.clips import ClipRequest
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


class WriteVideo(Protocol):
    def __call__(
        self,
        path: Path,
        frames: NDArray[np.uint8],
        *,
        fps: float = 16,
        times: Sequence[float] | None = None,
        lossless: bool = False,
    ) -> Path: ...


def _write_video(
    path: Path,
    frames: NDArray[np.uint8],
    *,
    fps: float = 16,
    times: Sequence[float] | None = None,
    lossless: bool = False,
) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as out:
        if lossless:
            stream = out.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt = "bgr0"
        else:
            options = {"crf": "12", "preset": "ultrafast"}
            stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    """Write uint8 [F,H,W,3] as H.264, or as lossless FFV1 (mkv)."""
    return _write_video


def _moving(num_frames: int, *, seed: int = 0, width: int = 96, height: int = 64, step: int = 1) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, (width + step * num_frames) // 8 + 2, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([picture[:height, step * t : step * t + width] for t in range(num_frames)])


@pytest.fixture
def moving() -> object:
    """Frames of a random picture that slides to the left by `step` pixels a frame."""
    return _moving


@pytest.fixture
def levels() -> object:
    """Frames whose gray level tells their index: 16 + 4 i."""

    def make(num_frames: int, *, width: int = 48, height: int = 32) -> NDArray[np.uint8]:
        return np.stack([np.full((height, width, 3), 16 + 4 * index, np.uint8) for index in range(num_frames)])

    return make


@pytest.fixture(scope="session")
def level_videos(tmp_path_factory: pytest.TempPathFactory, write_video: Any) -> Path:
    """Three videos of 30 frames; in each, the level of a frame tells its video and its index."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        frames = [np.full((32, 48, 3), 20 + 60 * number + index, np.uint8) for index in range(30)]
        write_video(folder / f"{number}.mkv", np.stack(frames), lossless=True)
    return folder


@pytest.fixture
def requests(level_videos: Path) -> list[ClipRequest]:
    """Three clips of 5 frames of each video, and one of 9 frames."""
    wanted = [(number, first, 5) for number in range(3) for first in (0, 5, 20)] + [(1, 10, 9)]
    size = Size(48, 32)
    return [
        ClipRequest(
            f"{number}.mkv@{first}", level_videos / f"{number}.mkv", "x" * (number + 1), first, length, 16.0, size
        )
        for number, first, length in wanted
    ]
