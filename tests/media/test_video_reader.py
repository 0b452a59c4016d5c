"""Reading videos: files written by PyAV directly, damaged or turned by editing their bytes."""

from __future__ import annotations

import struct
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.media.video_reader import VideoReader

# As ITU-T H.273 has them: red, green and blue shares of luma.
LUMA = {"bt601": (0.299, 0.587, 0.114), "bt709": (0.2126, 0.7152, 0.0722)}


def gray_levels(count: int) -> list[int]:
    """One gray level per frame, well apart, so that a frame tells its index."""
    return [16 + 5 * i for i in range(count)]


def write_video(path: Path, frames: np.ndarray, rate: Fraction | int = 24, codec: str = "libx264") -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}) as out:
        options = {"crf": "8", "preset": "ultrafast"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def write_levels(path: Path, count: int, rate: Fraction | int = 24, codec: str = "libx264") -> Path:
    frames = np.stack([np.full((32, 48, 3), level, np.uint8) for level in gray_levels(count)])
    return write_video(path, frames, rate, codec)


def read_indices(reader: VideoReader) -> list[int]:
    """Which of the frames of `write_levels` each frame read is."""
    levels = np.concatenate([chunk.mean((1, 2, 3)) for chunk in reader])
    return [round((level - 16) / 5) for level in levels]


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3)).astype(np.uint8)


class TestWholeFiles:
    @pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi"])
    def test_every_frame_in_order(self, tmp_path: Path, suffix: str) -> None:
        reader = VideoReader(write_levels(tmp_path / f"a.{suffix}", 21), chunk_frames=8)
        assert reader.info.size == (48, 32)
        assert reader.info.fps == pytest.approx(24)
        assert reader.info.num_frames in ((None, 21) if suffix == "mkv" else (21,))
        chunks = list(reader)
        assert [chunk.shape for chunk in chunks] == [(8, 32, 48, 3), (8, 32, 48, 3), (5, 32, 48, 3)]
        assert all(chunk.dtype == np.uint8 for chunk in chunks)
        assert read_indices(reader) == list(range(21))  # a second iteration reads anew
        assert reader.count_frames() == 21

    def test_gif(self, tmp_path: Path) -> None:
        frames = [Image.fromarray(np.full((32, 48, 3), level, np.uint8)) for level in gray_levels(5)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
        assert read_indices(VideoReader(tmp_path / "a.gif")) == list(range(5))

    def test_limit(self, tmp_path: Path) -> None:
        reader = VideoReader(write_levels(tmp_path / "a.mp4", 21), max_frames=5)
        assert read_indices(reader) == list(range(5))
        assert reader.count_frames() == 5

    def test_memory_holds_a_chunk_not_the_video(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", np.repeat(noise(40), 3, 0))
        tracemalloc.start()
        assert sum(len(chunk) for chunk in VideoReader(path, chunk_frames=4)) == 120
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 20 * 32 * 48 * 3


class TestResampling:
    def test_same_rate_changes_nothing(self, tmp_path: Path) -> None:
        path = write_levels(tmp_path / "a.mp4", 21, Fraction(30000, 1001))
        assert read_indices(VideoReader(path, fps=30000 / 1001)) == list(range(21))

    def test_half_and_double(self, tmp_path: Path) -> None:
        path = write_levels(tmp_path / "a.mp4", 20)
        assert read_indices(VideoReader(path, fps=12)) == list(range(0, 20, 2))
        doubled = read_indices(VideoReader(path, fps=48))
        assert len(doubled) in (39, 40)
        assert doubled == sorted(doubled)
        assert set(doubled) == set(range(20))

    @pytest.mark.parametrize("fps", [10, 16, 23.976, 25, 30, 60])
    def test_nearest_frame_and_same_duration(self, tmp_path: Path, fps: float) -> None:
        reader = VideoReader(write_levels(tmp_path / "a.mp4", 40), fps=fps)
        indices = read_indices(reader)
        assert abs(len(indices) - 40 * fps / 24) <= 1
        for place, index in enumerate(indices):
            assert abs(place * 24 / fps - index) <= 0.5 + 1e-6
        assert reader.count_frames() == len(indices)

    def test_with_a_limit(self, tmp_path: Path) -> None:
        path = write_levels(tmp_path / "a.mp4", 40)
        assert read_indices(VideoReader(path, fps=12, max_frames=4)) == [0, 2, 4, 6]


class TestColors:
    @pytest.mark.parametrize(
        ("tag", "height", "matrix"), [(1, 64, "bt709"), (6, 64, "bt601"), (2, 64, "bt601"), (2, 720, "bt709")]
    )
    def test_matrix_by_tag_or_by_size(self, tmp_path: Path, tag: int, height: int, matrix: str) -> None:
        color = np.array([200, 60, 30]) / 255
        red, green, blue = LUMA[matrix]
        luma = float(color @ (red, green, blue))
        cb, cr = (color[2] - luma) / (2 * (1 - blue)), (color[0] - luma) / (2 * (1 - red))
        planes = np.full((height * 3 // 2, 64), round(16 + 219 * luma), np.uint8)
        planes[height : height * 5 // 4] = round(128 + 224 * cb)
        planes[height * 5 // 4 :] = round(128 + 224 * cr)
        with av.open(str(tmp_path / "a.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=24, options={"crf": "1", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
            stream.codec_context.colorspace = tag
            out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
            out.mux(stream.encode(None))
        (chunk,) = VideoReader(tmp_path / "a.mp4")
        assert np.abs(chunk[0].astype(int) - np.round(color * 255)).max() <= 3


# The matrix of a track header for displays that turn the picture: a, b, c, d in 16.16 fixed point.
TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("clockwise", sorted(TURNS))
def test_rotation_metadata_is_applied(tmp_path: Path, clockwise: int) -> None:
    frame = np.full((32, 48, 3), 128, np.uint8)
    frame[:16, :24] = (230, 20, 20)  # red in the upper left corner
    path = write_video(tmp_path / "a.mp4", np.stack([frame] * 3))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    a, b, c, d = (value * 65536 for value in TURNS[clockwise])
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    reader = VideoReader(path)
    (chunk,) = reader
    expected = np.rot90(frame, -clockwise // 90)  # numpy turns anticlockwise
    assert chunk.shape[1:] == expected.shape
    assert reader.info.size == (expected.shape[1], expected.shape[0])
    # Away from the edges of the corner, where chroma is blurred.
    rows, columns = np.arange(4, expected.shape[0], 8), np.arange(4, expected.shape[1], 8)
    difference = chunk[0][rows][:, columns].astype(int) - expected[rows][:, columns]
    assert np.abs(difference).max() < 12


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(noise(1)[0], format="rgb24")))
        out.mux(stream.encode(None))
    reader = VideoReader(tmp_path / "a.mp4")
    assert reader.info.size == (64, 32)
    assert next(iter(reader)).shape == (1, 32, 64, 3)


def check_refused(path: Path) -> None:
    with pytest.raises(VideoInputError) as caught:
        VideoReader(path)
    check_message(caught.value, path)


def check_message(error: BaseException, path: Path) -> None:
    """One line that names the file and ends with what to do."""
    assert "\n" not in str(error)
    assert str(path) in str(error).rpartition(";")[0]


class TestRefused:
    def test_no_file(self, tmp_path: Path) -> None:
        check_refused(tmp_path / "none.mp4")
        check_refused(tmp_path)

    @pytest.mark.parametrize("name", ["a.mp4", "a.txt"])  # FFmpeg would play a .txt as text on a terminal
    @pytest.mark.parametrize("content", ["", "not a video at all\n" * 50])
    def test_no_video(self, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        check_refused(tmp_path / name)

    def test_picture(self, tmp_path: Path) -> None:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        check_refused(tmp_path / "a.png")

    def test_playlist_cannot_name_other_files(self, tmp_path: Path) -> None:
        write_levels(tmp_path / "a.mp4", 3)
        (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
        check_refused(tmp_path / "a.m3u8")
        (tmp_path / "a.ffconcat").write_text("ffconcat version 1.0\nfile a.mp4\n")
        check_refused(tmp_path / "a.ffconcat")

    def test_sound_only(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.mp4"), "w") as out:
            stream = out.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 8000
            out.mux(stream.encode(sound))
            out.mux(stream.encode(None))
        check_refused(tmp_path / "a.mp4")

    def test_wave_file(self, tmp_path: Path) -> None:
        with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(8000))
        check_refused(tmp_path / "a.wav")

    @pytest.mark.parametrize("value", [0, -1, float("nan")])
    def test_arguments(self, tmp_path: Path, value: float) -> None:
        path = write_levels(tmp_path / "a.mp4", 2)
        with pytest.raises(InvalidInputError, match="fps"):
            VideoReader(path, fps=value)
        with pytest.raises(InvalidInputError, match="max_frames"):
            VideoReader(path, max_frames=value)  # type: ignore[arg-type]


class TestDamaged:
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
    @pytest.mark.parametrize("kept", [0.4, 0.7])
    def test_truncated_files_give_their_good_frames_and_then_an_error(
        self, tmp_path: Path, suffix: str, kept: float
    ) -> None:
        path = write_video(tmp_path / f"a.{suffix}", noise(60))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        good: list[np.ndarray] = []
        with pytest.raises(VideoInputError) as caught:
            good.extend(VideoReader(path).frames())
        check_message(caught.value, path)
        assert 60 * kept * 0.4 < len(good) < 60

    def test_index_at_the_end_cut_off(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", noise(20))
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"moov") + 40])
        check_refused(path)

    def test_a_limit_before_the_damage_is_fine(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", noise(60))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
        assert VideoReader(path, max_frames=10).count_frames() == 10
