"""Opening videos to be judged: files of odd kinds, written by PyAV."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.sources import first_frame, fitted, open_truth, open_video, still_video
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HEIGHT, WIDTH = 64, 96


def write(
    path: Path,
    num_frames: int = 6,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    transfer: int | None = None,
) -> Path:
    """Frames of one gray level each, 40 more every frame, at 10 frames per second or at `times` (1/10 s)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = Fraction(1, 10)
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        for index in range(num_frames):
            level = np.full((size[1], size[0], 3), 20 + 40 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(level, format="rgb24").reformat(format=pixels)
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_with_sound(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        pictures.width, pictures.height, pictures.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = out.add_stream("aac", rate=8000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        wave.sample_rate = 8000
        for _ in range(3):
            level = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        out.mux(sound.encode(wave))
        out.mux(pictures.encode(None))
        out.mux(sound.encode(None))
    return path


def indices(frames: Sequence[np.ndarray]) -> list[int]:
    return [round((float(frame.mean()) - 20) / 40) for frame in frames]


def test_an_ordinary_file_needs_no_note(tmp_path: Path) -> None:
    source = open_video(write(tmp_path / "a.mp4"), label="a")
    assert (source.size, source.num_frames, source.notes) == ((WIDTH, HEIGHT), 6, ())
    assert source.fps == pytest.approx(10)
    assert indices(list(source.frames())) == indices(list(source.frames())) == list(range(6))
    assert indices([first_frame(source)]) == [0]


def test_a_variable_rate_is_read_by_time_and_said(tmp_path: Path) -> None:
    # The third frame stands for four tenths of a second.
    source = open_video(write(tmp_path / "a.mp4", times=[0, 1, 2, 6, 7, 8]), label="a")
    assert any("frame rate varies" in note for note in source.notes)
    assert source.num_frames is None
    shown = indices(list(source.frames()))
    assert shown == sorted(shown)
    assert shown.count(2) > 1
    assert len(shown) / source.fps == pytest.approx(0.9, abs=1 / source.fps)


def test_rounded_time_stamps_are_no_variable_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"  # Matroska rounds to milliseconds
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(24000, 1001), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(9):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    assert open_video(path, label="a").notes == ()


def test_sound_is_ignored_and_said(tmp_path: Path) -> None:
    source = open_video(write_with_sound(tmp_path / "a.mp4"), label="a")
    assert source.notes == ("its sound is ignored",)
    assert len(list(source.frames())) == 3


def test_ten_bits_and_hdr_are_said(tmp_path: Path) -> None:
    source = open_video(write(tmp_path / "a.mp4", pixels="yuv420p10le", transfer=16), label="a")
    assert source.notes[0] == "10 bits per channel, converted to 8"
    assert "HDR (PQ)" in source.notes[1]
    assert next(source.frames()).dtype == np.uint8


def test_another_size_is_fitted_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 2, size=(64, 64))
    source = open_video(path, label="a", size=Size(WIDTH, HEIGHT))
    assert source.size == (WIDTH, HEIGHT)
    assert next(source.frames()).shape == (HEIGHT, WIDTH, 3)
    assert source.notes[0] == "enlarged from 64x64 to 96x64 to be judged at one size"
    assert "33% of the picture left out" in source.notes[1]


def test_another_rate_is_read_by_time_and_said(tmp_path: Path) -> None:
    source = open_video(write(tmp_path / "a.mp4"), label="a", fps=5)
    assert indices(list(source.frames())) == [0, 2, 4]
    assert source.notes == ("read by time at 5 frames per second; the file has 10",)


def test_fitting_keeps_the_middle() -> None:
    frame = np.zeros((60, 100, 3), np.uint8)
    frame[:, 30:70] = 200
    assert fitted(frame, Size(40, 60)).min() == 200
    assert fitted(frame, Size(100, 60)).tolist() == frame.tolist()


def test_a_small_truth_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 2)
    with pytest.raises(VideoInputError, match=r"96x64, smaller than the video \(192x128\); give one of at least"):
        open_truth(path, size=Size(192, 128), fps=10)
    assert open_truth(path, size=Size(48, 32), fps=10).size == (48, 32)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VideoInputError, match="does not exist; check the path"):
        open_video(tmp_path / "none.mp4", label="none")


def test_a_truncated_file_is_told_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 256, (40, HEIGHT, WIDTH, 3)).astype(np.uint8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_video(path, label="a")
    with pytest.raises(VideoInputError, match="truncated"):
        list(source.frames())


def test_the_still_control_repeats_one_array() -> None:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    control = still_video(picture, label="still", fps=8, num_frames=3, notes=("a control",))
    assert control.path is None
    assert control.size == (WIDTH, HEIGHT)
    assert [frame is picture for frame in control.frames()] == [True] * 3
