"""Clips: which frames, at which times, with which pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.data.clips import Clip, ClipOptions, ClipRequest, clip_starts, fit_frame, plan_clips, read_clips
from swifti2v.data.report import Scene, Skipped
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.media.images import fit_image, image_to_tensor, load_image
from swifti2v.pixels import from_uint8

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Moving = Callable[..., NDArray[np.uint8]]


def request(path: Path, first_frame: int = 0, num_frames: int = 9, **changes: Any) -> ClipRequest:
    name = f"{path.name}@{first_frame}"
    return replace(ClipRequest(name, path, "a prompt", first_frame, num_frames, 16.0, Size(48, 32)), **changes)


def indices(item: Clip | Skipped) -> list[int]:
    """Which of the frames of `levels` a clip holds."""
    assert isinstance(item, Clip), item
    return [round((level - 16) / 4) for level in item.frames.mean((1, 2, 3))]


class TestStarts:
    @given(st.integers(0, 300), st.sampled_from([1, 5, 17, 81]), st.integers(1, 9), st.integers(1, 90))
    def test_clips_lie_in_the_scene(self, available: int, length: int, count: int, stride: int) -> None:
        for extraction in ("head", "uniform", "slide"):
            starts = clip_starts(available, ClipOptions(length, extraction, count, stride))
            assert starts == sorted(set(starts))
            assert bool(starts) == (available >= length)
            assert all(0 <= start <= available - length for start in starts)

    def test_known_answers(self) -> None:
        assert clip_starts(100, ClipOptions(17)) == [0]
        assert clip_starts(100, ClipOptions(17, "uniform", 3)) == [0, 42, 83]
        assert clip_starts(101, ClipOptions(17, "uniform")) == [42]
        assert clip_starts(100, ClipOptions(17, "slide")) == [0, 17, 34, 51, 68]
        assert clip_starts(30, ClipOptions(17, "slide", stride_frames=4)) == [0, 4, 8, 12]
        assert clip_starts(18, ClipOptions(17, "uniform", 5)) == [0, 1]

    @pytest.mark.parametrize("options", [(80,), (81, "random"), (81, "uniform", 0), (81, "slide", 1, 0)])
    def test_options_that_cannot_be_used(self, options: tuple[Any, ...]) -> None:
        with pytest.raises(InvalidInputError):
            ClipOptions(*options)


class TestPlan:
    def test_requests_and_reasons(self) -> None:
        def scene(name: str, size: Size, first_frame: int, num_frames: int) -> Scene:
            return Scene(name, Path(name), f"prompt of {name}", size, first_frame, num_frames, 50.0)

        scenes = [
            scene("wide.mp4", Size(1920, 1080), 30, 40),
            scene("tall.mp4", Size(720, 1280), 0, 17),
            scene("tiny.mp4", Size(320, 180), 0, 100),
            scene("short.mp4", Size(1920, 1080), 5, 16),
        ]
        buckets = [Size(640, 352), Size(352, 640)]
        plan = plan_clips(scenes, buckets, ClipOptions(17, "slide"), fps=16)
        assert [(item.name, item.first_frame, item.bucket, item.prompt) for item in plan.requests] == [
            ("wide.mp4@30", 30, "640x352x17", "prompt of wide.mp4"),
            ("wide.mp4@47", 47, "640x352x17", "prompt of wide.mp4"),
            ("tall.mp4@0", 0, "352x640x17", "prompt of tall.mp4"),
        ]
        assert [scene.name for scene in plan.scenes] == ["wide.mp4", "tall.mp4"]
        assert [(item.name, item.reason) for item in plan.skipped] == [
            ("tiny.mp4[0:100]", "smaller than its bucket"),
            ("short.mp4[5:21]", "too short"),
        ]

    def test_no_buckets(self) -> None:
        with pytest.raises(InvalidInputError, match="no bucket"):
            plan_clips([], [], ClipOptions())


class TestReading:
    def test_clips_of_one_video_in_one_pass(self, tmp_path: Path, write_video: Any, levels: Any) -> None:
        path = write_video(tmp_path / "a.mp4", levels(60))
        wanted = [request(path, start) for start in (40, 3, 12, 7)]  # overlapping, apart, and in any order
        clips = {item.name: item for item in read_clips(wanted)}
        assert {name: indices(clip) for name, clip in clips.items()} == {
            item.name: list(range(item.first_frame, item.first_frame + 9)) for item in wanted
        }
        clip = clips["a.mp4@3"]
        assert isinstance(clip, Clip)
        assert (clip.frames.shape, clip.frames.dtype) == ((9, 32, 48, 3), np.uint8)
        assert (clip.fps, clip.prompt, clip.bucket) == (16.0, "a prompt", "48x32x9")

    def test_clips_of_different_lengths(self, tmp_path: Path, write_video: Any, levels: Any) -> None:
        path = write_video(tmp_path / "a.mp4", levels(30))
        long, short = request(path, 0, 21), request(path, 4, 5)
        assert [indices(item) for item in read_clips([long, short])] == [list(range(4, 9)), list(range(21))]

    @pytest.mark.parametrize("source_fps", [24, 23.976, 29.97, 50])
    def test_another_rate(self, tmp_path: Path, write_video: Any, levels: Any, source_fps: float) -> None:
        path = write_video(tmp_path / "a.mp4", levels(60), fps=source_fps)
        (clip,) = read_clips([request(path, 2, 9)])
        for place, index in enumerate(indices(clip)):
            assert abs(index / source_fps - (2 + place) / 16) <= 0.5 / source_fps + 1e-3

    def test_a_variable_rate(self, tmp_path: Path, write_video: Any, levels: Any) -> None:
        """30 frames a second, then 20: frames are taken by their times, not by their numbers."""
        times = [index / 30 for index in range(30)] + [1 + index / 20 for index in range(20)]
        path = write_video(tmp_path / "a.mkv", levels(50), fps=30, times=times)
        (clip,) = read_clips([request(path, 4, 25)])
        for place, index in enumerate(indices(clip)):
            nearest = min(abs(time - (4 + place) / 16) for time in times)
            assert abs(times[index] - (4 + place) / 16) <= nearest + 2e-3

    def test_a_video_that_changed_costs_its_clips_only(self, tmp_path: Path, write_video: Any, levels: Any) -> None:
        path = write_video(tmp_path / "a.mp4", levels(20))
        good, late = read_clips([request(path, 4), request(path, 15)])
        assert indices(good) == list(range(4, 13))
        assert isinstance(late, Skipped)
        assert (late.name, late.reason) == ("a.mp4@15", "damaged")
        assert "changed" in late.detail

    def test_a_damaged_video(self, tmp_path: Path, write_video: Any, moving: Moving) -> None:
        path = write_video(tmp_path / "a.mp4", moving(60, step=3))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        items = list(read_clips([request(path, start) for start in (0, 30, 50)]))
        assert [item.name for item in items if isinstance(item, Skipped)][-1] == "a.mp4@50"
        (gone,) = read_clips([request(tmp_path / "gone.mp4")])
        assert isinstance(gone, Skipped)
        assert "does not exist" in gone.detail

    def test_one_clip_in_memory(self, tmp_path: Path, write_video: Any, levels: Any) -> None:
        import weakref

        path = write_video(tmp_path / "a.mp4", levels(60))
        alive: list[weakref.ref[Any]] = []
        for item in read_clips([request(path, start) for start in range(0, 45, 9)]):
            assert sum(reference() is not None for reference in alive) == 0
            assert isinstance(item, Clip)
            alive.append(weakref.ref(item.frames))
            del item  # what the loop holds is not what is counted
        assert len(alive) == 5


class TestPixels:
    """Training and inference see the same picture."""

    @pytest.mark.parametrize("size", [Size(96, 64), Size(64, 32), Size(32, 64), Size(80, 48)])
    def test_a_frame_equals_the_input_image(self, tmp_path: Path, write_video: Any, moving: Moving, size: Size) -> None:
        """Through a lossless video and `read_clips`, and through a PNG as `TwoStagePipeline.request` takes it."""
        frames = moving(5)
        video = write_video(tmp_path / "a.mkv", frames, lossless=True)
        Image.fromarray(frames[0]).save(tmp_path / "a.png")
        (clip,) = read_clips([request(video, num_frames=5, size=size)])
        assert isinstance(clip, Clip)
        image = fit_image(load_image(tmp_path / "a.png").image, size)
        assert torch.equal(from_uint8(clip.frames)[0, :, 0], image_to_tensor(image))

    def test_against_pillow(self, moving: Moving) -> None:
        """The center of the right aspect, resampled by Pillow's antialiased Lanczos filter."""
        frame = moving(1, width=120, height=60)[0]
        fitted = fit_frame(frame, Size(32, 32))
        direct = Image.fromarray(frame).resize((32, 32), Image.Resampling.LANCZOS, box=(30, 0, 90, 60))
        assert np.array_equal(fitted, np.asarray(direct))

    def test_fine_detail_is_averaged_not_aliased(self) -> None:
        checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
        assert np.abs(fit_frame(checks, Size(32, 32)).astype(int)[2:-2, 2:-2] - 127.5).max() < 3
