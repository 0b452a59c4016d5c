"""Procedural motion: what a prompt names is what the pixels do."""

from __future__ import annotations

import numpy as np
import pytest

from swifti2v.data.procedural import (
    CAMERA_MOTIONS,
    PHRASES,
    SCENE_MOTIONS,
    Motion,
    displacement,
    find_horizon,
    render,
    sample_motions,
)
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size

SIZE = Size(64, 36)


def field(name: str, speed: float = 1.0, num_frames: int = 81) -> np.ndarray:
    return displacement([Motion(name, speed)], size=SIZE, num_frames=num_frames)


@pytest.mark.parametrize("name", PHRASES)
def test_every_motion_starts_from_the_image(name: str) -> None:
    made = field(name, num_frames=5)
    assert made.shape == (5, 36, 64, 2)
    assert np.abs(made[0]).max() < 1e-6
    assert np.isfinite(made).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pan left", "pan right"),
        ("tilt up", "tilt down"),
        ("truck left", "truck right"),
        ("drift left", "drift right"),
        ("flow left", "flow right"),
    ],
)
def test_opposite_prompts_move_opposite_ways(one: str, other: str) -> None:
    np.testing.assert_allclose(field(one)[-1], -field(other)[-1], atol=1e-6)
    assert np.abs(field(one)[-1]).mean() > 0.02


def test_a_camera_that_pans_right_shows_what_was_further_right() -> None:
    assert (field("pan right")[-1][..., 0] > 0.1).all()


def test_zooming_in_samples_nearer_to_the_centre() -> None:
    left, right = field("zoom in")[-1][18, 2], field("zoom in")[-1][18, -3]
    assert left[0] > 0.05
    assert right[0] < -0.05


def test_clockwise_rotation_brings_the_left_up() -> None:
    # What stands at the top center of the rotated picture came from further left.
    assert field("rotate clockwise")[-1][0, 32, 0] < -0.01


def test_speed_scales_the_motion() -> None:
    np.testing.assert_allclose(field("pan left", 0.5)[-1] * 2, field("pan left")[-1], atol=1e-6)


def test_drift_moves_the_sky_and_leaves_the_ground() -> None:
    made = field("drift left")[-1]
    assert np.abs(made[:6]).mean() > 10 * np.abs(made[-6:]).mean()


def test_render_follows_the_field() -> None:
    photograph = np.zeros((200, 300, 3), np.uint8)
    photograph[:, 150:] = 255  # an edge in the middle
    moved = displacement([Motion("pan right", 1.0)], size=SIZE, num_frames=41)
    frames = render(photograph, moved, center=(150, 100), crop_width=64)
    bright = (frames[..., 0] > 127).mean(axis=(1, 2))
    assert bright[0] == pytest.approx(0.5, abs=0.02)
    assert bright[-1] == pytest.approx(0.6, abs=0.02)  # half of 0.2 widths in half of the time


def test_render_does_not_invent_detail() -> None:
    with pytest.raises(InvalidInputError, match="larger photograph"):
        render(np.zeros((50, 50, 3), np.uint8), field("still", num_frames=1), center=(25, 25), crop_width=32)


def test_the_horizon_is_where_the_color_changes() -> None:
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[:30] = 200
    assert find_horizon(picture) == pytest.approx((30 - 45) / 160, abs=0.02)


def test_sampling_covers_every_motion() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_motions(rng) for _ in range(600)]
    names = {motion.name for motions in drawn for motion in motions}
    assert names == {*CAMERA_MOTIONS, *SCENE_MOTIONS, "still"}
    assert all(len(motions) <= 2 for motions in drawn)
    waves = [motions for motions in drawn if {"sway", "ripple"} & {motion.name for motion in motions}]
    assert 0.35 < len(waves) / len(drawn) < 0.53  # learned last, drawn most
