"""Bytes that are counted are those that were allocated: sums written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swifti2v.memory.live_bytes import LiveBytes, accounted, fused_attention


def test_the_peak_is_the_sum_of_what_lives_at_once() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        first = outside + 1  # 4,000 bytes
        second = first[:10]  # a view
        third = first * 2  # 8,000
        del third
        fourth = first.to(torch.bfloat16)  # 6,000
        outside.add_(1)  # in place, and not made here
    assert live.peak_bytes == 8000
    assert live.current_bytes == 6000
    del fourth, second
    assert live.current_bytes == 4000
    del first
    assert live.current_bytes == 0


def test_a_new_phase_begins_with_what_is_alive() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100)
        torch.zeros(1000)
        assert live.peak_bytes == 4400
        live.reset_peak()
        torch.zeros(200)
    assert live.peak_bytes == 400 + 800
    assert live.current_bytes == kept.nbytes


def test_attention_on_the_meta_device_makes_its_output_only() -> None:
    query, key, value = (torch.empty(1, 2, length, 8, device="meta") for length in (100, 50, 50))
    with accounted() as account:
        F.scaled_dot_product_attention(query, key, value)
    assert account.peak_bytes == query.nbytes
    assert account.tflop * 1e12 == 2 * (2 * 100 * 50 * 8) * 2
    real = torch.randn(1, 1, 4, 8)
    with fused_attention() as counted:
        expected = torch.softmax(real @ real.mT / 8**0.5, dim=-1) @ real
        torch.testing.assert_close(F.scaled_dot_product_attention(real, real, real), expected)
    assert counted.flop == 0  # PyTorch's own, and counted there


@pytest.mark.parametrize("tokens", [10, 40])
def test_flops_of_products(tokens: int) -> None:
    layer = torch.nn.Linear(16, 32, device="meta")
    with accounted() as account:
        layer(torch.empty(tokens, 16, device="meta"))
    assert account.tflop * 1e12 == 2 * tokens * 16 * 32
