"""The benchmark of `light` counts what it says, on a clip of its own."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.light import MEASURES, judge, methods, motion_reference, table


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(30, 220, (16, 40, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    return np.stack([wide[:, 2 * t : 2 * t + 96] for t in range(9)])


def test_methods_are_judged_against_the_truth(truth: np.ndarray) -> None:
    made, confidence = methods(motion_reference(truth, "clean"), truth, None)
    assert list(made) == ["bicubic", "Lanczos", "transport", "light"]
    assert all(frames.shape == truth.shape for frames in made.values())
    results = {name: judge(frames, truth, confidence) for name, frames in made.items()}
    assert results["transport"]["psnr"] > results["bicubic"]["psnr"] + 1
    exact = judge(truth, truth, confidence)
    assert exact["hf"] == pytest.approx(1)
    assert exact["psnr"] > 80
    assert exact["warping_error_1e4"] < results["bicubic"]["warping_error_1e4"]
    lines = table({"clip clean": results}, "clean").splitlines()
    assert len(lines) == 2 + len(made)
    assert lines[0].count("|") == 2 + len(MEASURES)


def test_damage_costs(truth: np.ndarray) -> None:
    clean, worse = (motion_reference(truth, condition) for condition in ("clean", "damaged"))
    assert clean.shape == worse.shape == (9, 16, 24, 3)
    assert np.abs(clean.astype(float) - worse).mean() > 2
