from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.evaluation.motion import FramePair, consecutive_pairs
from swifti2v.evaluation.seams import FrameChange, SeamRatio, frame_change, seam_ratio

HEIGHT, WIDTH, FRAMES = 64, 96, 49


def panning() -> list[np.ndarray]:
    """A pan of 1.5 pixels a frame with sensor noise, eight bits, as a decoder gives it."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((HEIGHT + 8, WIDTH + 2 * FRAMES, 3)).astype(np.float32)
    coarse, fine = cv2.GaussianBlur(noise, (0, 0), 6), cv2.GaussianBlur(noise, (0, 0), 1.2)
    plane = 0.5 + 0.1 * coarse / coarse.std() + 0.04 * fine / fine.std()
    frames = []
    for t in range(FRAMES):
        shift = np.float32([[1, 0, -1.5 * t], [0, 1, 0]])
        frame = cv2.warpAffine(plane, shift, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)
        frames.append(frame + 0.004 * generator.standard_normal(frame.shape).astype(np.float32))
    return frames


def eight_bits(frames: list[np.ndarray]) -> list[np.ndarray]:
    return [(frame.clip(0, 1) * 255).round().astype(np.uint8) for frame in frames]


def with_steps(frames: list[np.ndarray], first: int, every: int) -> list[np.ndarray]:
    """Brightness is 2% up in every second run of frames, from frame `first` on."""
    return [frame * (1.02 if t >= first and (t - first) // every % 2 == 0 else 1.0) for t, frame in enumerate(frames)]


def ratio_of(frames: list[np.ndarray], segment_size: int = 3) -> SeamRatio:
    return seam_ratio(map(frame_change, consecutive_pairs(eight_bits(frames))), segment_size=segment_size)


def test_steps_at_all_latent_frame_borders_are_not_seams() -> None:
    assert ratio_of(with_steps(panning(), 5, 4)).luma == pytest.approx(1, abs=0.1)


def test_borders_are_those_of_the_segment_size() -> None:
    """Steps of 2% at 9, 17, 25, 33, 41, of which only that at 25 is a border of segments of three."""
    changes = [frame_change(pair) for pair in consecutive_pairs(eight_bits(with_steps(panning(), 9, 8)))]
    two, three = (seam_ratio(changes, segment_size=size) for size in (2, 3))
    assert two.luma > 1.2
    assert two.worst == max(two)
    assert three.luma < 1.1


def test_segments_that_alternate_in_sharpness_are_seen_in_the_detail() -> None:
    frames = [cv2.GaussianBlur(frame, (0, 0), 0.8) if (t - 1) // 12 % 2 else frame for t, frame in enumerate(panning())]
    assert ratio_of(frames).detail > 1.2


def test_a_still_video_has_ratio_one_and_a_short_one_none() -> None:
    nothing = [FrameChange(0.0, 0.0)] * 28
    assert seam_ratio(nothing, segment_size=3) == (1, 1)
    assert math.isnan(seam_ratio(nothing[:8], segment_size=3).luma)
    assert math.isnan(seam_ratio([], segment_size=3).luma)


def test_change_of_a_still_pair_under_a_flash_is_the_flash() -> None:
    frame = panning()[0].clip(0, 0.9)
    assert frame_change(FramePair(frame, frame + 0.05)).luma == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(("segment_size", "temporal_factor"), [(1, 4), (3, 1), (0, 4)])
def test_sizes_without_two_kinds_of_border_are_refused(segment_size: int, temporal_factor: int) -> None:
    with pytest.raises(InvalidInputError):
        seam_ratio([], segment_size=segment_size, temporal_factor=temporal_factor)
