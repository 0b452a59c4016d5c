"""The form of motion: what procedural clips do, smooth, from nothing, for as long as one likes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from swifti2v.data.procedural import PHRASES, Motion, displacement
from swifti2v.geometry import Size
from swifti2v.mini.motion_examples import path_of

if TYPE_CHECKING:
    from swifti2v.mini.path import MotionPath

SIZE = Size(160, 88)


def path(name: str, speed: float = 1.0) -> MotionPath:
    return path_of([(name, speed)], rows=22, columns=40, aspect=88 / 160, horizon=0.03)


def moved(motion: MotionPath, frame: int) -> np.ndarray:
    still = path("still").origins(0, *SIZE)
    return motion.origins(frame, *SIZE) - still


@pytest.mark.parametrize("name", PHRASES)
@pytest.mark.parametrize("frame", [7, 60])
def test_a_path_is_the_procedural_field(name: str, frame: int) -> None:
    truth = displacement([Motion(name)], size=SIZE, num_frames=1, first_frame=frame, horizon=0.03)[0]
    error = moved(path(name), frame) - truth
    assert np.sqrt((error**2).mean()) * SIZE.width < 0.05  # pixels


@pytest.mark.parametrize("name", PHRASES)
def test_nothing_has_moved_at_frame_0(name: str) -> None:
    assert np.abs(moved(path(name), 0)).max() < 1e-6


@pytest.mark.parametrize(
    "name", ["pan left", "tilt up", "zoom out", "rotate clockwise", "truck right", "sway", "ripple"]
)
def test_steps_change_slowly_over_a_long_clip(name: str) -> None:
    fields = np.stack([path(name).origins(frame, *SIZE, area=(20, 11)) for frame in range(321)])
    steps = np.diff(fields, axis=0)
    judder = np.sqrt((np.diff(steps, axis=0) ** 2).mean() / (steps**2).mean())
    assert judder < 0.26  # no seam at a latent frame or at a window of 81


def test_a_long_pan_is_slowed_and_a_short_one_is_not() -> None:
    motion = path("pan right", 1.8)
    same, share = motion.slowed(81)
    assert share == 1
    assert same is motion
    slowed, share = motion.slowed(321)
    assert share < 0.5
    assert np.abs(moved(slowed, 320)).max() <= 0.41


def test_waves_are_not_slowed() -> None:
    motion = path_of([("pan left", 1.0), ("ripple", 1.0)], rows=22, columns=40, aspect=0.55, horizon=0.0)
    slowed, share = motion.slowed(641)
    assert share < 1
    np.testing.assert_array_equal(slowed.maps[2:], motion.maps[2:])


def test_motions_add_up() -> None:
    both = path_of([("pan left", 1.0), ("sway", 1.0)], rows=22, columns=40, aspect=0.55, horizon=0.0)
    np.testing.assert_allclose(both.camera, path("pan left").camera)
    assert both.maps[2:6].any()


def test_travel_tells_a_still_picture_from_a_moving_one() -> None:
    assert path("still").travel(81, *SIZE) < 1e-6
    assert path("pan left").travel(81, *SIZE) == pytest.approx(0.2, rel=0.01)
