"""The judge of one video, on frames in memory with planted defects of known size."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.errors import VideoInputError
from swifti2v.evaluation import video
from swifti2v.evaluation.metrics import detail_retention
from swifti2v.evaluation.motion import FramePair
from swifti2v.evaluation.registry import METRICS
from swifti2v.evaluation.sources import FrameSource
from swifti2v.evaluation.video import (
    STILL_PAIR,
    Standard,
    flow_scale,
    judge_video,
    likeliest_segment_size,
    measure_pair,
)
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from swifti2v.evaluation.results import Curve, VideoResult

HEIGHT, WIDTH = 64, 96


def panning(num_frames: int, *, step: float = 1.5, noise: float = 0.004, seed: int = 0) -> list[np.ndarray]:
    """A pan with sensor noise, in floats."""
    generator = np.random.default_rng(seed)
    pattern = generator.standard_normal((HEIGHT, WIDTH + int(step * num_frames) + 8, 3)).astype(np.float32)
    coarse, fine = cv2.GaussianBlur(pattern, (0, 0), 6), cv2.GaussianBlur(pattern, (0, 0), 1.2)
    plane = 0.5 + 0.1 * coarse / coarse.std() + 0.04 * fine / fine.std()
    frames = []
    for t in range(num_frames):
        moved = cv2.warpAffine(
            plane, np.float32([[1, 0, -step * t], [0, 1, 0]]), (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC
        )
        frames.append(moved + noise * generator.standard_normal(moved.shape).astype(np.float32))
    return frames


def eight_bits(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [(frame.clip(0, 1) * 255).round().astype(np.uint8) for frame in frames]


def source_of(frames: Sequence[np.ndarray], *, label: str = "clip", path: str | None = "clip.mp4") -> FrameSource:
    height, width = frames[0].shape[:2]

    def generate() -> Generator[np.ndarray]:
        yield from eight_bits(frames)

    return FrameSource(label, Size(width, height), 16.0, generate, path=path, num_frames=len(frames))


def judged(frames: Sequence[np.ndarray], **standard: object) -> VideoResult:
    return judge_video(source_of(frames), Standard(**standard))


def curve(result: VideoResult, name: str) -> Curve:
    (found,) = [each for each in result.curves if each.metric == name]
    return found


@pytest.fixture(scope="module")
def clean() -> VideoResult:
    return judged(panning(49))


def test_a_clean_moving_clip_has_no_seams(clean: VideoResult) -> None:
    assert 0.95 < clean.values["seam_luma"] < 1.05
    assert 0.95 < clean.values["seam_detail"] < 1.05
    assert clean.values["scene_cuts"] == 0
    assert [note.partition(" (")[0] for note in clean.notes] == ["moves evenly"]


def test_steps_of_two_percent_at_segment_borders_raise_the_seam_ratio(clean: VideoResult) -> None:
    steps = [frame * (1.02 if t >= 13 and (t - 13) // 12 % 2 == 0 else 1.0) for t, frame in enumerate(panning(49))]
    result = judged(steps)
    assert result.values["seam_luma"] > 1.2
    change = curve(result, "change")
    peaks = sorted(range(len(change.values)), key=lambda place: change.values[place])[-3:]
    assert sorted(change.frames[place] for place in peaks) == [13, 25, 37]
    assert result.values["change"] > clean.values["change"]


def test_the_likeliest_segment_size_is_found() -> None:
    steps = [frame * (1.02 if t >= 9 and (t - 9) // 8 % 2 == 0 else 1.0) for t, frame in enumerate(panning(49))]
    result = judged(steps, segment_size=None)
    assert result.values["segment_size"] == 2
    assert result.values["seam_luma"] > 1.2
    assert "segment_size" not in judged(panning(3)).values
    assert likeliest_segment_size([STILL_PAIR.change] * 5) is None


def test_a_known_translation_gives_its_length(clean: VideoResult) -> None:
    assert clean.values["flow_magnitude"] == pytest.approx(1.5, abs=0.05)
    assert clean.values["flow_variation"] < 0.05
    assert clean.values["still_share"] < 1


def test_motion_that_stops_and_starts_varies() -> None:
    whole = panning(13, step=2.0, noise=0)
    stopping = [whole[t if t < 7 else 6] for t in range(13)]
    values = judged(stopping).values
    assert values["flow_magnitude"] == pytest.approx(1.0, abs=0.1)
    assert values["flow_variation"] == pytest.approx(1.0, abs=0.1)


def test_large_frames_report_motion_in_their_own_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "FLOW_LONG_SIDE", 192)
    frames = [cv2.resize(frame, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for frame in panning(3, step=1.5)]
    assert flow_scale(Size(384, 256)) == 0.5
    assert judged(frames).values["flow_magnitude"] == pytest.approx(6, abs=0.2)


@pytest.mark.parametrize(("size", "scale"), [((2560, 1408), 0.5), ((1408, 2560), 0.5), ((1280, 704), 1), ((96, 64), 1)])
def test_frames_are_reduced_above_1280_pixels(size: tuple[int, int], scale: float) -> None:
    assert flow_scale(Size(*size)) == scale


def vivid(frame: np.ndarray, factor: float) -> np.ndarray:
    gray = np.asarray(frame @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return gray + factor * (frame - gray)


def test_a_rise_of_saturation_by_five_percent_is_reported() -> None:
    picture = panning(1)[0]
    # Steady at both ends, so that their means are 5% apart.
    result = judged([vivid(picture, 1 + 0.05 * float(np.clip((t - 4) / 16, 0, 1))) for t in range(25)])
    assert result.values["drift_saturation"] == pytest.approx(5, abs=0.5)
    course = curve(result, "drift_saturation")
    assert course.values[-1] == pytest.approx(5, abs=0.5)
    assert len(course.values) == 25
    for name in ("sharpness", "contrast", "red", "green", "blue"):
        assert result.values[f"drift_{name}"] < 0.5


def test_a_ramp_of_saturation_from_end_to_end() -> None:
    picture = panning(1)[0]
    result = judged([vivid(picture, 1 + 0.05 * t / 20) for t in range(21)])
    # Means of three frames at each end: 18 of 20 steps apart, of a start that is a step up.
    assert result.values["drift_saturation"] == pytest.approx(5 * 0.9 / 1.0025, abs=0.3)


def test_one_channel_that_drifts_is_named() -> None:
    frames = [frame + np.array([0, 0, 0.04 * (t >= 10)], np.float32) for t, frame in enumerate([panning(1)[0]] * 20)]
    values = judged(frames).values
    assert values["drift_blue"] == pytest.approx(4, abs=0.2)
    assert max(values["drift_red"], values["drift_green"]) < 0.1


def test_flicker_of_a_known_height() -> None:
    frames = [panning(1)[0] * 0.9 + 0.02 * (t % 2) for t in range(9)]
    assert judged(frames).values["flicker"] == pytest.approx(0.02 * 255, abs=0.3)


def test_a_still_video_is_named_so(clean: VideoResult) -> None:
    still = judged([panning(1)[0]] * 5)
    assert still.values["still_share"] == 100
    assert any(note.startswith("this is a still picture") for note in still.notes)
    control = judge_video(source_of([panning(1)[0]] * 3, path=None), Standard())
    assert control.notes == ("it is too short to have borders of segments and others: no seam ratio",)


def test_a_still_video_with_noise_is_still() -> None:
    picture, generator = panning(1)[0], np.random.default_rng(3)
    noisy = [picture + 0.002 * generator.standard_normal(picture.shape).astype(np.float32) for _ in range(4)]
    assert any(note.startswith("this is a still picture") for note in judged(noisy).notes)


def test_the_measures_of_a_repeated_frame_are_those_of_a_copy() -> None:
    (frame,) = eight_bits(panning(1))
    measured = measure_pair(frame, frame.copy())
    assert measured.change == pytest.approx(STILL_PAIR.change, abs=1e-6)
    assert measured[1:-1] == pytest.approx(STILL_PAIR[1:-1], abs=1e-6)
    assert measured.steps == pytest.approx(STILL_PAIR.steps, abs=1e-6)

    def same() -> Generator[np.ndarray]:
        yield from [frame] * 10

    short = FrameSource("a", Size(WIDTH, HEIGHT), 16.0, same)
    long = source_of([panning(1)[0]] * 10, label="a", path=None)
    first, second = (judge_video(each, Standard(image=frame)) for each in (short, long))
    assert first.values == pytest.approx(second.values, abs=1e-6, nan_ok=True)
    assert [each.frames for each in first.curves] == [each.frames for each in second.curves]


def test_a_repeated_frame_costs_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_frames: np.ndarray) -> None:
        raise AssertionError("a flow between a frame and itself")

    monkeypatch.setattr(video, "measure_pair", never)
    (frame,) = eight_bits(panning(1))

    def same() -> Generator[np.ndarray]:
        yield from [frame] * 3

    assert judge_video(FrameSource("a", Size(WIDTH, HEIGHT), 16.0, same), Standard()).num_frames == 3


def test_each_flow_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.evaluation import motion

    calls = []
    compute = motion.optical_flow
    monkeypatch.setattr(motion, "optical_flow", lambda a, b: calls.append(None) or compute(a, b))
    judged(panning(10), image=eight_bits(panning(1))[0])
    # Two for each of nine pairs; two for the detail of frames 8 and 9.
    assert len(calls) == 2 * 9 + 2 * 2


def test_a_cut_is_counted_and_named() -> None:
    frames = panning(6) + panning(6, seed=5)
    result = judged(frames)
    assert result.values["scene_cuts"] == 1
    assert "new scenes begin at frames 6" in result.notes


def test_against_the_image() -> None:
    frames = panning(18)
    image = eight_bits(frames)[0]
    result = judged(frames, image=image)
    assert result.values["first_psnr"] == 100
    assert result.values["first_ssim"] == pytest.approx(1, abs=1e-5)
    assert result.values["first_ms_ssim"] == pytest.approx(1, abs=1e-5)
    detail = curve(result, "detail_retention")
    assert detail.frames == (8, 16, 17)  # frame 0 is the image itself
    assert detail.values[-1] == pytest.approx(detail_retention(FramePair(image, eight_bits(frames)[-1])))
    assert result.values["detail_retention"] == pytest.approx(sum(detail.values) / 3)
    soft = judged([frames[0], *(cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in frames[1:])], image=image)
    assert soft.values["first_psnr"] == 100
    assert curve(soft, "detail_retention").values[0] < 0.75 * detail.values[0]


def test_against_the_truth() -> None:
    frames = [0.5 * frame for frame in panning(7)]
    result = judged([frame + 0.1 for frame in frames], truth=source_of(frames))
    assert result.values["psnr"] == pytest.approx(20, abs=0.1)
    assert result.values["high_frequency_ratio"] == pytest.approx(1, abs=0.02)
    assert result.values["ssim"] < 0.99
    assert curve(result, "ms_ssim").frames == tuple(range(7))
    soft = judged([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in frames], truth=source_of(frames))
    assert soft.values["high_frequency_ratio"] < 0.3


@pytest.mark.parametrize(("shown", "true", "words"), [(7, 5, "ends after 5 of 7"), (5, 7, "its first 5 frames")])
def test_truths_of_another_length_are_compared_on_common_frames(shown: int, true: int, words: str) -> None:
    result = judged(panning(shown), truth=source_of(panning(true)))
    assert any(words in note for note in result.notes)
    assert curve(result, "psnr").frames == tuple(range(5))
    assert result.num_frames == shown


def test_one_frame_says_nothing_of_motion() -> None:
    result = judged(panning(1))
    assert math.isnan(result.values["flow_magnitude"])
    assert math.isnan(result.values["drift_red"])
    assert math.isnan(result.values["scene_cuts"])
    assert any("one frame" in note for note in result.notes)


def test_every_number_and_curve_has_a_meaning(clean: VideoResult) -> None:
    registered = {metric.name for metric in METRICS}
    full = judged(panning(3), image=eight_bits(panning(1))[0], truth=source_of(panning(3)), segment_size=None)
    optional = {"vmaf", "colorvideovdp"}  # test_vmaf.py, test_colorvideovdp.py
    assert set(full.values) | optional == registered
    assert {each.metric for each in full.curves} <= registered
    assert all(len(each.frames) == len(each.values) for each in (*full.curves, *clean.curves))


def test_frames_are_dropped_as_they_are_measured() -> None:
    alive: list[int] = []

    def generate() -> Generator[np.ndarray]:
        frames = []
        for frame in eight_bits(panning(30)):
            shown = frame.copy()
            frames.append(weakref.ref(shown))
            alive.append(sum(reference() is not None for reference in frames))
            yield shown

    judge_video(FrameSource("a", Size(WIDTH, HEIGHT), 16.0, generate), Standard())
    # Besides those in flight: the one being made, the one before it, and two that threads have not let go of.
    assert max(alive) <= video.FRAMES_IN_FLIGHT + 4


def test_progress_counts_frames() -> None:
    told: list[tuple[int, int | None]] = []
    judge_video(source_of(panning(4)), Standard(), on_frame=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_damage_on_the_way_ends_the_judgment() -> None:
    def damaged() -> Generator[np.ndarray]:
        yield from eight_bits(panning(4))
        raise VideoInputError("damaged after 4 frames; copy it again")

    with pytest.raises(VideoInputError, match="after 4 frames"):
        judge_video(FrameSource("a", Size(WIDTH, HEIGHT), 16.0, damaged), Standard())


def test_the_smallest_size() -> None:
    small = [cv2.resize(frame, (32, 32)) for frame in panning(3)]
    assert math.isfinite(judged(small).values["flow_magnitude"])
    with pytest.raises(VideoInputError, match="at least 32x32"):
        judged([frame[:30] for frame in small])
