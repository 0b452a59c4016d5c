"""Damage is the same for the same seed, and each kind has the strength that was asked for."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from swifti2v.training.light.damage import (
    CLEAN,
    HEAVY,
    MILD,
    REDUCTIONS,
    Damage,
    compressed,
    damaged,
    reduced,
    sample_damage,
)

FRAMES, SIDE = 13, 96


@pytest.fixture(scope="module")
def still() -> np.ndarray:
    """One smooth picture, [13, 96, 96, 3]: any change from frame to frame is damage."""
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE, 3)).astype(np.float32), (0, 0), 4)
    picture = 0.5 + 0.15 * picture / picture.std()
    return np.repeat(np.rint(np.clip(picture, 0.1, 0.9) * 255).astype(np.uint8)[None], FRAMES, axis=0)


def made(frames: np.ndarray, damage: Damage, seed: int = 0) -> np.ndarray:
    return damaged(frames, damage, np.random.default_rng(seed)).astype(np.float64) / 255


def test_the_same_seed_gives_the_same_damage(still: np.ndarray) -> None:
    damage = replace(HEAVY, noise=0.02, slow_swim=0.3, flicker=0.2)
    assert np.array_equal(made(still, damage), made(still, damage))
    assert not np.array_equal(made(still, damage), made(still, damage, seed=1))
    assert sample_damage(np.random.default_rng(5)) == sample_damage(np.random.default_rng(5))


def test_no_damage_changes_nothing(still: np.ndarray) -> None:
    assert np.array_equal(damaged(still, CLEAN, np.random.default_rng(0)), still)


@pytest.mark.parametrize("strength", [0.01, 0.03])
def test_noise_has_its_deviation(still: np.ndarray, strength: float) -> None:
    difference = made(still, Damage(noise=strength)) - still / 255
    assert difference.std() == pytest.approx(strength, rel=0.03)
    assert np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1] < 0.1


@pytest.mark.parametrize("strength", [0.02, 0.045])
def test_colors_stay_within_their_change(strength: float) -> None:
    gray = np.full((49, 8, 8, 3), 128, dtype=np.uint8)
    change = (made(gray, Damage(color=strength), seed=2) - 128 / 255).mean(axis=(1, 2))
    bound = strength * (1 + 128 / 255) + 1 / 255
    assert bound / 4 < np.abs(change).max() <= bound  # gain and offset
    drift = np.abs(np.diff(change, axis=0)).max()
    flickering = (made(gray, Damage(color=strength, flicker=1.0), seed=2) - 128 / 255).mean(axis=(1, 2))
    assert np.abs(np.diff(flickering, axis=0)).max() > 1.5 * drift


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_softness_is_a_gaussian_of_its_width(strength: float) -> None:
    edge = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    edge[:, :, 16:] = 200
    slope = np.diff(made(edge, Damage(softness=strength))[0, 16, :, 0])
    places = np.arange(len(slope))
    center = (slope * places).sum() / slope.sum()
    deviation = np.sqrt((slope * (places - center) ** 2).sum() / slope.sum())
    assert deviation == pytest.approx(strength, rel=0.12)


@pytest.mark.parametrize("kind", ["swim", "slow_swim"])
def test_swim_moves_by_its_length(kind: str) -> None:
    """A ramp turns a displacement into a level: across by its slope, and down in another channel."""
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    ramp = np.stack((20 + 2 * columns, 20 + 2 * rows, np.full_like(rows, 90)), axis=-1).astype(np.uint8)
    frames = np.repeat(ramp[None], 17, axis=0)
    shift = (made(frames, Damage(**{kind: 0.8}))[:, 8:-8, 8:-8, :2] * 255 - frames[:, 8:-8, 8:-8, :2]) / 2
    length = np.sqrt((shift**2).sum(axis=-1).mean())
    assert length == pytest.approx(0.8, rel=0.2) if kind == "swim" else 0.5 < length < 0.95
    change = np.sqrt((np.diff(shift, axis=0) ** 2).sum(axis=-1).mean())
    assert change > 1.1 * length if kind == "swim" else change < 0.6 * length


def test_compression_costs_more_at_a_higher_factor(still: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    busy = np.clip(still + rng.normal(0, 12, still.shape), 0, 255).astype(np.uint8)[:, :31, :33]
    errors = [float(np.mean((compressed(busy, crf).astype(float) - busy) ** 2)) for crf in (10, 24, 38)]
    assert errors == sorted(errors)
    assert errors[2] > 2 * errors[0]
    assert compressed(busy, 24).shape == busy.shape


def test_drawn_damage_stays_within_what_is_trained() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_damage(rng) for _ in range(400)]
    assert 0.18 < sum(each == CLEAN for each in drawn) / 400 < 0.35
    for name, most in (("softness", 1.0), ("swim", 0.9), ("slow_swim", 0.5), ("color", 0.045), ("noise", 0.03)):
        values = [getattr(each, name) for each in drawn]
        assert 0.8 * most < max(values) <= most, name
    assert {each.crf for each in drawn} <= {0, *range(18, 35)}
    assert MILD.swim < HEAVY.swim < 0.9


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_keep_the_mean(still: np.ndarray, reduction: str) -> None:
    small = reduced(still[0], 24, 32, reduction=reduction)  # type: ignore[arg-type]
    assert small.shape == (24, 32, 3)
    assert small.dtype == np.uint8
    assert abs(float(small.mean()) - float(still[0].mean())) < 1
