"""VMAF: known scores, the package on whole clips as the oracle, and what is said where the package is missing."""

from __future__ import annotations

import importlib.util
import socket
import sys
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch

from swifti2v.evaluation.evaluate import EvaluationRequest, evaluate_videos
from swifti2v.evaluation.sources import FrameSource
from swifti2v.evaluation.video import Standard, judge_video
from swifti2v.evaluation.vmaf import MISSING, SPARSE_EVERY, VmafFeatures, VmafMeter, open_vmaf
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

SIZE = Size(96, 64)
EQUAL_AND_STILL = 97.43
"""What VMAF v0.6.1 gives for equal pictures without motion: its authors warn that this is not 100."""

# Features and score of two frames as Netflix' own program printed them: github.com/Netflix/vmaf/issues/89. No motion.
PRINTED = (
    ((1.0128811514641758, 0.7720661307371304, 0.9810677514600266, 0.9934652376657016, 0.9973464945079024), 99.644289),
    ((1.0128800895873187, 0.7725760590946087, 0.9811771366777354, 0.9934907720962023, 0.9973505692210137), 99.645736),
)

needs_vmaf = pytest.mark.skipif(importlib.util.find_spec("vmaf_torch") is None, reason="vmaf-torch is not installed")


def panning(num_frames: int, *, step: int = 2) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((SIZE.height, SIZE.width + step * num_frames, 3))
    plane = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 1.5)
    pixels = ((0.5 + 0.15 * plane / plane.std()).clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack([pixels[:, step * t : step * t + SIZE.width] for t in range(num_frames)])


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def scores(frames: np.ndarray, truth: np.ndarray, *, every: int = 1) -> dict[int, float]:
    found = open_vmaf(SIZE)
    assert found is not None
    meter = VmafMeter(found._model, every=every)
    earlier = [None, *truth[:-1]]
    return meter.scores([meter.measure(t, frames[t], truth[t], earlier[t]) for t in range(len(frames))])


def whole_clip(frames: np.ndarray, truth: np.ndarray) -> list[float]:
    """The package's own call on all frames at once; luma by the standard's matrix in double precision."""
    from vmaf_torch import VMAF

    def luma(clip: np.ndarray) -> torch.Tensor:
        levels = np.rint(16 + clip.astype(np.float64) @ [0.2126, 0.7152, 0.0722] * 219 / 255)
        return torch.from_numpy(levels).float()[:, None]

    with torch.no_grad():
        return VMAF(clip_score=True)(luma(truth), luma(frames)).flatten().tolist()


@needs_vmaf
def test_equal_videos_score_near_100() -> None:
    moving = scores(panning(4), panning(4))
    assert moving[0] == pytest.approx(EQUAL_AND_STILL, abs=0.01)
    assert [moving[t] for t in (1, 2, 3)] == [100, 100, 100]
    still = panning(1).repeat(3, axis=0)
    assert list(scores(still, still).values()) == pytest.approx([EQUAL_AND_STILL] * 3, abs=0.01)


@needs_vmaf
def test_more_blur_and_more_noise_score_lower() -> None:
    truth = panning(3)
    by_blur = [np.mean(list(scores(blurred(truth, sigma), truth).values())) for sigma in (0.5, 0.8, 1.2, 2.0)]
    assert by_blur == sorted(by_blur, reverse=True)
    assert by_blur[0] - by_blur[-1] > 30
    noise = np.random.default_rng(1).standard_normal(truth.shape)
    noisy = [(truth + level * noise).clip(0, 255).astype(np.uint8) for level in (4, 12, 36)]
    by_noise = [np.mean(list(scores(frames, truth).values())) for frames in noisy]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_noise[0] - by_noise[-1] > 20


@needs_vmaf
def test_scores_of_known_features_are_those_of_netflix() -> None:
    meter = open_vmaf(SIZE)
    assert meter is not None
    found = meter.scores([VmafFeatures(0.0, torch.tensor([features])) for features, _score in PRINTED])
    assert list(found.values()) == pytest.approx([score for _features, score in PRINTED], abs=0.002)


@needs_vmaf
def test_frame_by_frame_is_the_package_on_the_whole_clip() -> None:
    """Motion looks one frame ahead, so a clip that starts, stops and ends needs the right neighbors."""
    slides = panning(6)
    truth = slides[[0, 1, 1, 2, 3, 5]]
    soft = blurred(truth, 0.9)
    expected = whole_clip(soft, truth)
    assert len(set(np.round(expected, 2))) > 3
    found = scores(soft, truth)
    assert list(found) == list(range(6))
    assert list(found.values()) == pytest.approx(expected, abs=0.02)


@needs_vmaf
def test_a_sparse_meter_gives_the_same_scores_of_fewer_frames() -> None:
    truth = panning(8)
    soft = blurred(truth, 0.9)
    every = scores(soft, truth)
    for step, kept in ((2, [0, 2, 4, 6]), (3, [0, 3, 6]), (7, [0, 7])):
        assert scores(soft, truth, every=step) == {t: every[t] for t in kept}


@needs_vmaf
def test_large_frames_are_measured_sparsely() -> None:
    steps = [open_vmaf(size).every for size in (SIZE, Size(1920, 1088), Size(2560, 1408))]  # type: ignore[union-attr]
    assert steps == [1, 1, SPARSE_EVERY]


@needs_vmaf
def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert scores(panning(2), panning(2))[1] == 100


@needs_vmaf
def test_the_judge_reports_a_curve_and_its_mean() -> None:
    truth = panning(5)

    def source(frames: np.ndarray) -> FrameSource:
        def generate() -> Generator[np.ndarray]:
            yield from frames

        return FrameSource("clip", SIZE, 16.0, generate, path="clip.mp4", num_frames=len(frames))

    soft = blurred(truth, 0.9)
    result = judge_video(source(soft), Standard(truth=source(truth[:4]), vmaf=open_vmaf(SIZE)))
    (curve,) = [each for each in result.curves if each.metric == "vmaf"]
    expected = whole_clip(soft[:4], truth[:4])
    assert curve.frames == (0, 1, 2, 3)
    assert curve.values == pytest.approx(expected, abs=0.02)
    assert result.values["vmaf"] == pytest.approx(np.mean(expected), abs=0.02)
    assert "vmaf" not in judge_video(source(soft), Standard(truth=source(truth))).values


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, size=SIZE, fps=8, crf=2, preset="ultrafast") as writer:
        writer.write(panning(3))
    return path


def test_where_the_package_is_missing_a_line_says_so(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    assert open_vmaf(SIZE) is None
    result = evaluate_videos(EvaluationRequest((clip,), truth=clip))
    assert [video.notes.count(MISSING) for video in result.videos] == [1, 0]
    assert MISSING == "VMAF: not installed; pip install 'swifti2v[vmaf]'"
    assert "vmaf" not in {metric.name for metric in result.metrics}
    assert result.videos[0].values["psnr"] == 100
    without_truth = evaluate_videos(EvaluationRequest((clip,)))
    assert all(MISSING not in video.notes for video in without_truth.videos)


@needs_vmaf
def test_evaluate_has_vmaf_beside_the_truth(clip: Path) -> None:
    result = evaluate_videos(EvaluationRequest((clip,), truth=clip))
    same, still = result.videos
    assert same.values["vmaf"] == pytest.approx((EQUAL_AND_STILL + 100 + 100) / 3, abs=0.01)
    assert still.values["vmaf"] < same.values["vmaf"] - 10
    assert MISSING not in same.notes
    assert "vmaf-torch" in result.settings["versions"]
