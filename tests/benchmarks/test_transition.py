"""Spectra of motion references: known pictures have known spectra."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.transition import NUM_RINGS, REAL, REDUCED, Kind, ring_spectrum, spectral_distance, table


def waves(cycles: float, amplitude: float = 60.0) -> np.ndarray:
    """Vertical stripes of so many cycles over 96 pixels, uint8 [64,96,3]."""
    x = np.arange(96) / 96
    row = 128 + amplitude * np.sin(2 * np.pi * cycles * x)
    return np.broadcast_to(row[None, :, None], (64, 96, 3)).round().astype(np.uint8)


@pytest.mark.parametrize("ring", [3, 10, 20])
def test_a_wave_stands_in_its_ring(ring: int) -> None:
    cycles = (ring + 0.5) / NUM_RINGS * 48  # the Nyquist frequency is 48 cycles
    assert int(ring_spectrum(waves(cycles)).argmax()) == ring


def test_half_the_amplitude_is_six_decibels_less() -> None:
    cycles = 10.5 / NUM_RINGS * 48
    loud, quiet = (ring_spectrum(waves(cycles, amplitude))[10] for amplitude in (80.0, 40.0))
    assert loud - quiet == pytest.approx(20 * np.log10(2), abs=0.1)


def test_distance_is_that_of_the_fine_rings() -> None:
    flat = np.zeros(NUM_RINGS)
    coarse, fine = flat.copy(), flat.copy()
    coarse[0] += 50
    fine[NUM_RINGS // 2 :] += 4
    assert spectral_distance(flat, coarse) == 0.0
    assert spectral_distance(flat, flat + 3) == pytest.approx(3)
    assert spectral_distance(flat, fine) == pytest.approx(4 * np.sqrt(12 / 18))


def test_table_compares_with_stage_one_and_with_the_clip() -> None:
    clip = np.stack([waves(20), waves(20, 40), waves(20, 50)])
    kinds = {REDUCED: Kind(), "transition 0.5": Kind(), REAL: Kind()}
    for kind, frames in zip(kinds.values(), (clip, clip, np.stack([waves(30)] * 3)), strict=True):
        kind.add(frames, clip)
    lines = table(kinds).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells[REDUCED][1:] == ["0.00", "-"]
    assert cells["transition 0.5"][1] == "0.00"
    assert float(cells["transition 0.5"][0]) > 3
    assert cells[REAL][0] == "0.00"
