"""ColorVideoVDP: a stand-in for the package in an environment of its own, which tells what it was given."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from swifti2v.errors import InvalidInputError, MemoryBudgetError, VideoInputError
from swifti2v.evaluation.colorvideovdp import INSTALL, ColorVideoVdp, JodScores, open_colorvideovdp
from swifti2v.evaluation.evaluate import EvaluationRequest, evaluate_videos
from swifti2v.evaluation.sources import FrameSource
from swifti2v.evaluation.video import Standard, judge_video
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

SIZE = Size(48, 32)
FPS = 12.5
CONDITIONS = "ColorVideoVDP v0.0, stand-in, (standard_4k)"

# What is used of cvvdp 0.5.7, in its own shapes: frames are [batch, channel, frame, H, W], differences [batch, channel,
# frame, band]. A frame loses its mean absolute difference in levels, a video the mean of its frames, a photograph
# (one frame) twice that. Frames are asked for as blocks on a card are: all of one video first, then of the other.
METRIC = """
import logging, os
import numpy
import pycvvdp.video_source

class cvvdp:
    device = "cpu"

    def __init__(self, display_name, quiet):
        assert quiet
        self.display_name = display_name

    def get_info_string(self):
        return '"ColorVideoVDP v0.0, stand-in, (' + self.display_name + ')"'

    def predict_video_source(self, source):
        print("words that are no answer")
        height, width, count = source.get_video_size()
        assert source.get_frames_per_second() == {fps}
        assert source.display == self.display_name
        lost = []
        for begin in range(0, count, 2):
            block = range(begin, min(begin + 2, count))
            shown = [source.get_test_frame(t, device=self.device, colorspace="DKLd65") for t in block]
            truths = [source.get_reference_frame(t, device=self.device, colorspace="DKLd65") for t in block]
            assert all(each.shape == (1, 3, 1, height, width) for each in shown + truths)
            lost += [255 * numpy.abs(a - b).mean() for a, b in zip(shown, truths)]
        bands = numpy.asarray(lost, dtype=numpy.float64).reshape(1, 1, count, 1)
        return self.do_pooling_and_jods(bands), dict(Q_per_ch=bands)

    def do_pooling_and_jods(self, bands):
        return 10 - bands.mean() * (2 if bands.shape[2] == 1 else 1)
"""
SOURCE = """
import numpy

class video_source_dm:
    def __init__(self, display_photometry):
        self.display = display_photometry

    def apply_dm_and_color_transform(self, frame, colorspace):
        assert colorspace == "DKLd65"
        return frame

def numpy2torch_frame(pixels, frame, device, dim_order):
    assert (pixels.dtype, frame, dim_order) == (numpy.uint8, 0, "HWC")
    return pixels.transpose(2, 0, 1)[None, :, None].astype(numpy.float64) / 255
"""
TORCH = """
import numpy

def as_tensor(values, device):
    return numpy.asarray(values)
"""


def make_environment(folder: Path, *, metric: str = METRIC.replace("{fps}", str(FPS))) -> str:
    """Write an environment with the stand-in; return its interpreter."""
    package = folder / "packages" / "pycvvdp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(metric)
    (package / "video_source.py").write_text(SOURCE)
    (folder / "packages" / "torch.py").write_text(TORCH)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/packages" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def python(tmp_path: Path) -> str:
    return make_environment(tmp_path / "environment")


def clip(num_frames: int, *, seed: int = 0) -> np.ndarray:
    shape = (num_frames, SIZE.height, SIZE.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def source(frames: np.ndarray, label: str = "clip") -> FrameSource:
    def generate() -> Generator[np.ndarray]:
        yield from frames

    return FrameSource(label, SIZE, FPS, generate, path=f"{label}.mp4", num_frames=len(frames))


def ask(meter: ColorVideoVdp, frames: np.ndarray, truth: np.ndarray) -> JodScores:
    pairs = zip(frames, truth, strict=True)
    return meter.scores(pairs, size=SIZE, fps=FPS, num_frames=len(frames))


def test_equal_videos_have_10_and_others_what_the_package_says(python: str) -> None:
    truth = clip(5)
    meter = open_colorvideovdp(python)
    assert meter.conditions == CONDITIONS
    assert ask(meter, truth, truth) == JodScores(10.0, (10.0,) * 5)
    shown = clip(5, seed=1)
    shown[3] = truth[3]
    lost = np.abs(shown.astype(float) - truth).mean(axis=(1, 2, 3))
    found = ask(meter, shown, truth)
    assert found.frames == pytest.approx(10 - lost)
    assert found.frames[3] == 10
    assert found.total == pytest.approx(10 - lost.mean())


def test_one_frame_is_a_photograph(python: str) -> None:
    shown, truth = clip(1, seed=1), clip(1)
    expected = 10 - 2 * np.abs(shown.astype(float) - truth).mean()
    found = ask(ColorVideoVdp(python, ""), shown, truth)
    assert found == JodScores(pytest.approx(expected), (pytest.approx(expected),))


def test_frames_that_are_not_contiguous(python: str) -> None:
    truth = clip(2)
    mirrored = truth[:, :, ::-1]
    expected = 10 - np.abs(mirrored.astype(float) - truth).mean(axis=(1, 2, 3))
    assert ask(ColorVideoVdp(python, ""), mirrored, truth).frames == pytest.approx(expected)


def test_the_judge_compares_as_many_frames_as_there_are_of_both(python: str) -> None:
    shown, truth = clip(4, seed=1), clip(3)
    seen: list[tuple[int, int | None]] = []
    standard = Standard(truth=source(truth, "truth"), colorvideovdp=ColorVideoVdp(python, ""))
    result = judge_video(source(shown), standard, on_frame=lambda done, total: seen.append((done, total)))
    expected = 10 - np.abs(shown[:3].astype(float) - truth).mean(axis=(1, 2, 3))
    (curve,) = [each for each in result.curves if each.metric == "colorvideovdp"]
    assert curve.frames == (0, 1, 2)
    assert curve.values == pytest.approx(expected)
    assert result.values["colorvideovdp"] == pytest.approx(expected.mean())
    assert seen[-3:] == [(1, 3), (2, 3), (3, 3)]
    assert "colorvideovdp" not in judge_video(source(shown), Standard(truth=source(truth, "truth"))).values


def test_evaluate_has_it_beside_the_truth_and_says_under_which_conditions(python: str, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    with VideoWriter(video, size=Size(96, 64), fps=FPS, crf=2, preset="ultrafast") as writer:
        writer.write(np.stack([np.full((64, 96, 3), 40 * t, np.uint8) for t in range(4)]))
    evaluation = evaluate_videos(EvaluationRequest((video,), truth=video, cvvdp=python))
    same, still = evaluation.videos
    assert same.values["colorvideovdp"] == 10
    assert still.values["colorvideovdp"] == pytest.approx(10 - 40 * (0 + 1 + 2 + 3) / 4, abs=1)
    assert evaluation.settings["colorvideovdp"] == CONDITIONS
    assert "colorvideovdp" in {metric.name for metric in evaluation.metrics}
    plain = evaluate_videos(EvaluationRequest((video,), truth=video))
    assert "colorvideovdp" not in plain.settings


def test_an_interpreter_without_the_package(tmp_path: Path) -> None:
    python = make_environment(tmp_path, metric="import a_module_that_nobody_has")
    with pytest.raises(InvalidInputError) as caught:
        open_colorvideovdp(python)
    assert str(caught.value) == (
        f"{python!r} cannot run ColorVideoVDP (ModuleNotFoundError: No module named 'a_module_that_nobody_has'); "
        f"make its environment with: {INSTALL}"
    )


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no program that can be run; name the Python of ColorVideoVDP"):
        open_colorvideovdp(str(tmp_path / "nowhere"))


def test_a_process_that_ends_before_it_has_read_everything(tmp_path: Path) -> None:
    """The pipe is then closed under the writer, who has more to write than it holds."""
    broken = METRIC.replace('print("words that are no answer")', 'raise RuntimeError("CUDA out of memory")')
    meter = ColorVideoVdp(make_environment(tmp_path, metric=broken), "")
    frames = clip(100)
    with pytest.raises(MemoryBudgetError, match=r"out of memory \(RuntimeError: CUDA out of memory\)"):
        ask(meter, frames, frames)


def test_a_video_that_is_damaged_ends_the_process(python: str) -> None:
    def pairs() -> Generator[tuple[np.ndarray, np.ndarray]]:
        yield clip(1)[0], clip(1)[0]
        raise VideoInputError("frame 1 is damaged")

    with pytest.raises(VideoInputError, match="frame 1 is damaged"):
        ColorVideoVdp(python, "").scores(pairs(), size=SIZE, fps=FPS, num_frames=3)


def test_fewer_frames_than_told(python: str) -> None:
    frames = clip(2)
    with pytest.raises(InvalidInputError, match="cannot run ColorVideoVDP"):
        ColorVideoVdp(python, "").scores(zip(frames, frames, strict=True), size=SIZE, fps=FPS, num_frames=3)
