"""What the writer leaves on disk, judged by reading the boxes of the file and decoding it with PyAV."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from swifti2v.errors import InvalidInputError, OutputError
from swifti2v.geometry import Size
from swifti2v.media import video_writer
from swifti2v.media.video_writer import VideoWriter, check_output_path, frame_rate

SIZE = Size(96, 64)


def moving_frames(count: int, size: Size = SIZE) -> np.ndarray:
    """A smooth picture that moves one pixel per frame, so that every frame is another."""
    if count == 0:
        return np.empty((0, size.height, size.width, 3), np.uint8)
    x = np.arange(size.width + count)
    y = np.arange(size.height)[:, None]
    picture = np.stack([127 + 90 * np.sin(x / 7 + y / 11), 127 + 90 * np.cos(x / 5 - y / 13), 60 + x % 128 + 0 * y], -1)
    pixels = picture.astype(np.uint8)
    return np.stack([pixels[:, i : i + size.width] for i in range(count)])


def noise_frames(count: int, size: Size = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3)).astype(np.uint8)


def decode_timed(path: Path) -> dict[int, np.ndarray]:
    """Frames by their time stamp."""
    with av.open(str(path)) as container:
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}


def decode(path: Path) -> np.ndarray:
    return np.stack(list(decode_timed(path).values()))


def boxes(path: Path) -> list[bytes]:
    """Names of the top-level boxes of an MP4."""
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        length, name = struct.unpack(">I4s", data[position : position + 8])
        names.append(name)
        position += length
    return names


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    frames = moving_frames(41)
    with VideoWriter(path, size=SIZE, fps=16) as writer:
        for start in range(0, 41, 4):
            writer.write(frames[start : start + 4])
    assert writer.num_frames == 41
    assert writer.partial_path is None
    return path


class TestFinishedFile:
    def test_is_the_only_file(self, video: Path) -> None:
        assert list(video.parent.iterdir()) == [video]

    def test_stream_is_what_browsers_play(self, video: Path) -> None:
        with av.open(str(video)) as container:
            (stream,) = container.streams
            context = stream.codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
            assert (context.width, context.height) == SIZE
            assert (stream.frames, stream.average_rate) == (41, 16)
            assert stream.duration * stream.time_base == Fraction(41, 16)
            assert stream.start_time == 0
            # BT.709, limited range: ITU-T H.273 numbers
            assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)

    def test_index_comes_first_and_there_are_no_fragments(self, video: Path) -> None:
        names = boxes(video)
        assert b"moof" not in names
        assert names.index(b"moov") < names.index(b"mdat")

    def test_frames_come_back_in_order_and_on_time(self, video: Path) -> None:
        frames = moving_frames(41)
        decoded = decode(video)
        assert decoded.shape == frames.shape
        for i in (0, 17, 40):
            errors = [np.mean((decoded[i].astype(float) - frame) ** 2) for frame in frames]
            assert int(np.argmin(errors)) == i
        with av.open(str(video)) as container:
            assert [frame.time * 16 for frame in container.decode(video=0)] == pytest.approx(list(range(41)))


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv", "MP4"])
def test_every_container(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip.{extension}"
    with VideoWriter(path, size=SIZE, fps=24, preset="ultrafast") as writer:
        writer.write(moving_frames(7))
    assert len(decode(path)) == 7
    assert list(tmp_path.iterdir()) == [path]


def test_colors_survive(tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 150, 120]], np.uint8)
    frame = np.repeat(np.repeat(colors[None], 64, 0), 16, 1)[None]
    path = tmp_path / "colors.mp4"
    with VideoWriter(path, size=SIZE, fps=24, crf=4) as writer:
        writer.write(np.repeat(frame, 3, 0))
    with av.open(str(path)) as container:
        decoded = next(container.decode(video=0))
        planes = decoded.to_ndarray(format="yuv420p")
    centers = 8 + 16 * np.arange(6)
    luma = planes[32, centers].astype(float)
    chroma = planes[64:].reshape(2, 32, 48)[:, 16, centers // 2].astype(float)
    # Back to RGB by the definition of BT.709 in limited range, not by FFmpeg.
    y, cb, cr = (luma - 16) / 219, (chroma[0] - 128) / 224, (chroma[1] - 128) / 224
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    assert np.abs(np.stack([red, green, blue], -1) * 255 - colors).max() < 6
    # And by whatever a player does that trusts the tags.
    played = decoded.to_ndarray(format="rgb24")[32, centers]
    assert np.abs(played.astype(int) - colors).max() < 8


def test_quality_of_a_textured_frame(tmp_path: Path) -> None:
    size = Size(320, 192)
    generator = np.random.default_rng(3)
    # 1/f amplitudes as in natural pictures.
    spectrum = np.fft.rfft2(generator.normal(size=(3, size.height, size.width)))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size.height), np.fft.rfftfreq(size.width), indexing="ij"))
    texture = np.fft.irfft2(spectrum / np.maximum(radius, 1 / 192), s=(size.height, size.width))
    mixed = np.einsum("ij,jhw->hwi", np.array([[1, 0.15, 0], [1, 0, 0.1], [1, -0.1, 0.1]]), texture)
    frame = np.clip(127 + 40 * mixed / texture[0].std(), 0, 255).astype(np.uint8)
    path = tmp_path / "texture.mp4"
    with VideoWriter(path, size=size, fps=24, crf=16) as writer:
        writer.write(np.repeat(frame[None], 5, 0))
    assert psnr(decode(path)[0], frame) >= 36


def test_part_file_can_be_watched_while_it_grows(tmp_path: Path) -> None:
    frames = moving_frames(60)
    path = tmp_path / "clip.mp4"
    seen = []
    with VideoWriter(path, size=SIZE, fps=8) as writer:
        for frame in frames:
            writer.write(frame[None])
            if writer.num_frames in (30, 45, 60):
                assert not path.exists()
                assert writer.part_path.name.startswith(".")
                seen.append(decode_timed(writer.part_path))
    counts = [len(part) for part in seen]
    assert counts == sorted(counts)
    assert counts[0] >= 8
    assert counts[2] >= 60 - 24  # encoder lookahead and the open fragment
    final = decode_timed(path)
    for part in seen:  # copied, not encoded again
        assert all(np.array_equal(frame, final[time]) for time, frame in part.items())


def test_tensors_give_the_same_file_as_arrays(tmp_path: Path) -> None:
    frames = moving_frames(5)
    outputs = []
    for name, given in (("a.mp4", frames), ("b.mp4", torch.from_numpy(frames))):
        with VideoWriter(tmp_path / name, size=SIZE, fps=24) as writer:
            writer.write(given)
            writer.write(given[:0])
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]


def test_views_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.from_numpy(moving_frames(3)).permute(0, 3, 1, 2).contiguous()  # [f, 3, H, W] in memory
    with VideoWriter(tmp_path / "a.mp4", size=SIZE, fps=24, crf=4) as writer:
        writer.write(tensor.permute(0, 2, 3, 1))
    assert psnr(decode(tmp_path / "a.mp4"), moving_frames(3)) > 30


def write_and_raise(writer: VideoWriter, count: int, error: BaseException | type[BaseException]) -> None:
    with writer:
        writer.write(moving_frames(count))
        raise error


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_partial_file_is_playable_and_the_old_result_untouched(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        path = tmp_path / "clip.mp4"
        path.write_bytes(b"an older result")
        writer = VideoWriter(path, size=SIZE, fps=24)
        with pytest.raises(error):
            write_and_raise(writer, 20, error)
        assert path.read_bytes() == b"an older result"
        assert writer.partial_path == tmp_path / "clip.partial.mp4"
        assert len(decode(writer.partial_path)) == 20  # also what the encoder still held
        assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.partial.mp4"]

    @pytest.mark.parametrize(("keep", "count"), [(False, 20), (True, 0)])
    def test_nothing_is_left_if_unwanted_or_empty(self, tmp_path: Path, keep: bool, count: int) -> None:
        writer = VideoWriter(tmp_path / "clip.mp4", size=SIZE, fps=24, keep_partial=keep)
        with pytest.raises(ValueError, match="stop"):
            write_and_raise(writer, count, ValueError("stop"))
        assert list(tmp_path.iterdir()) == []
        assert writer.partial_path is None

    def test_a_video_without_frames_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="no frames"), VideoWriter(tmp_path / "clip.mp4", size=SIZE, fps=24):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_part_file_of_a_killed_run_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / ".clip.part.mp4").write_bytes(b"left by a killed run")
        with VideoWriter(tmp_path / "clip.mp4", size=SIZE, fps=24) as writer:
            writer.write(moving_frames(3))
        assert len(decode(tmp_path / "clip.mp4")) == 3
        assert list(tmp_path.iterdir()) == [tmp_path / "clip.mp4"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603 - fixed arguments
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S603, S607 - fixed arguments


class TestFullDisk:
    def test_while_encoding(self, small_disk: Path) -> None:
        path = small_disk / "clip.mp4"
        writer = VideoWriter(path, size=SIZE, fps=24, crf=4, preset="ultrafast")
        with pytest.raises(OutputError, match=r"disk is full .* free space") as caught, writer:
            writer.write(noise_frames(200))
        assert "\n" not in str(caught.value)
        assert writer.num_frames < 200
        assert not path.exists()
        assert writer.partial_path is not None
        assert len(decode(writer.partial_path)) > 0
        assert sorted(small_disk.iterdir()) == [writer.partial_path]

    def test_while_finishing(self, small_disk: Path) -> None:
        # The part file fits (about 170 KiB), its copy does not.
        path = small_disk / "clip.mp4"
        writer = VideoWriter(path, size=SIZE, fps=24, crf=16, preset="ultrafast")
        with pytest.raises(OutputError, match="disk is full"), writer:
            writer.write(noise_frames(30))
        assert not path.exists()
        assert writer.partial_path is not None
        assert len(decode(writer.partial_path)) == writer.num_frames

    def test_simulated(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def copy(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(video_writer, "_copy_packets", copy)
        writer = VideoWriter(tmp_path / "clip.mp4", size=SIZE, fps=24)
        with pytest.raises(OutputError, match=r"disk is full .* free space"), writer:
            writer.write(moving_frames(9))
        assert [p.name for p in tmp_path.iterdir()] == ["clip.partial.mp4"]

    def test_lost_frames_are_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video_writer, "_copy_packets", lambda *_: 8)
        with pytest.raises(OutputError, match="only 8 of 9"), VideoWriter(tmp_path / "a.mp4", size=SIZE, fps=24) as w:
            w.write(moving_frames(9))
        assert not (tmp_path / "a.mp4").exists()


class TestPaths:
    @pytest.mark.parametrize(
        "name", ["clip", "clip.avi", "clip.mp4.txt", "folder.mp4", "none/clip.mp4", "file/clip.mp4", "a" * 251 + ".mp4"]
    )
    def test_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(OutputError):
            check_output_path(tmp_path / name)

    def test_unwritable_parent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.geteuid() == 0:  # root may write anywhere but into /proc
            folder = Path("/proc/self")
        else:
            folder = tmp_path / "locked"
            folder.mkdir(mode=0o500)
        with pytest.raises(OutputError):
            check_output_path(folder / "clip.mp4")

    def test_checking_leaves_nothing_behind(self, tmp_path: Path) -> None:
        assert check_output_path(str(tmp_path / "clip.mp4")) == tmp_path / "clip.mp4"
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_goes_away(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        writer = VideoWriter(folder / "a.mp4", size=SIZE, fps=24)
        shutil.rmtree(folder)
        with pytest.raises(OutputError), writer:
            writer.write(moving_frames(3))


class TestArguments:
    @pytest.mark.parametrize(
        "wrong",
        [
            *({"size": size} for size in (Size(95, 64), Size(96, 63), Size(0, 64))),
            *({"fps": fps} for fps in (0, -1, float("nan"), float("inf"), 10_000)),
            {"crf": 52},
            {"preset": "quick"},
        ],
        ids=str,
    )
    def test_refused(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError) as caught:
            VideoWriter(tmp_path / "a.mp4", **{"size": SIZE, "fps": 24} | wrong)
        assert {caught.value.param: caught.value.value} == wrong

    @pytest.mark.parametrize(
        "frames",
        [
            np.zeros((1, 64, 95, 3), np.uint8),
            np.zeros((64, 96, 3), np.uint8),
            np.zeros((1, 3, 64, 96), np.uint8),
            np.zeros((1, 64, 96, 3), np.float32),
        ],
    )
    def test_frames_of_another_shape_or_type(self, tmp_path: Path, frames: np.ndarray) -> None:
        with (
            pytest.raises(InvalidInputError),
            VideoWriter(tmp_path / "a.mp4", size=SIZE, fps=24) as writer,
        ):
            writer.write(frames)

    def test_outside_with(self, tmp_path: Path) -> None:
        writer = VideoWriter(tmp_path / "a.mp4", size=SIZE, fps=24)
        with pytest.raises(InvalidInputError):
            writer.write(moving_frames(1))


@pytest.mark.parametrize(
    ("fps", "fraction"),
    [
        (24, Fraction(24)),
        (16.0, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (0.0001, Fraction(1, 1000)),
    ],
)
def test_frame_rate(fps: float, fraction: Fraction) -> None:
    assert frame_rate(fps) == fraction
