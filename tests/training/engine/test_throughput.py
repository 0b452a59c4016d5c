"""Rates and MFU against arithmetic by hand; device names as drivers write them."""

from __future__ import annotations

import pytest
import torch

from swifti2v.training.engine.throughput import peak_of_card, peak_tflop_per_second, rates


def test_amounts_become_rates_and_mfu() -> None:
    found = rates({"samples": 8.0, "tflop": 4000.0}, seconds=2.0, peak=8 * 500.0)
    assert found == {"samples_per_second": 4.0, "tflop_per_second": 2000.0, "mfu": 0.5}


def test_without_a_peak_or_a_count_there_is_no_mfu() -> None:
    assert "mfu" not in rates({"tflop": 1.0}, seconds=1.0, peak=None)
    assert "mfu" not in rates({"samples": 1.0}, seconds=1.0, peak=1.0)
    assert peak_tflop_per_second(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Quadro P400", None),
    ],
)
def test_cards_are_told_apart(name, peak) -> None:
    assert peak_of_card(name) == peak
