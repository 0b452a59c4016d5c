"""The full-size benchmark counts what the account counts, at a small size; its networks are those of the preset."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size_account, full_size_networks, speed
from swifti2v.geometry import Size
from swifti2v.memory.costs import Decoding, Encoding, Forward, Weights
from swifti2v.memory.measure import measure
from swifti2v.memory.networks import WAN22


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def test_networks_are_those_of_the_preset() -> None:
    built = {
        WAN22.stage_one_codec: full_size_networks.codec(full_size_networks.VAE21, "meta"),
        WAN22.stage_two_codec: full_size_networks.codec(full_size_networks.VAE22, "meta"),
        WAN22.stage_two: full_size_networks.stage_two("meta"),
    }
    for described, network in built.items():
        assert parameters(network) == measure(Weights(described, "bfloat16")).num_parameters
        assert next(network.parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_rows_hold_the_flops_of_the_account() -> None:
    size = Size(256, 128)
    codec = full_size_networks.codec(full_size_networks.VAE22, "meta")
    encode, decode = full_size_account._codec_rows(codec, size, None, num_chunks=3)
    assert encode.tflop == pytest.approx(measure(Encoding(WAN22.stage_two_codec, "bfloat16", *size)).work(3).tflop)
    assert decode.tflop == pytest.approx(measure(Decoding(WAN22.stage_two_codec, "bfloat16", *size)).work(3).tflop)
    row = full_size_account._stage_two_row(size, 5)
    cost = measure(Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, 96, 5, 8, 16))
    assert row.tflop == pytest.approx(cost.work.tflop)


def test_checks_compare_with_the_goals() -> None:
    rows = [
        full_size_account.Row(name, 1.0, gib)
        for name, gib in (
            ("Stage II, one forward of 5 frames", 1.3),
            ("decode, 3 latent frames, untiled", 18.5),
            ("decode, 3 latent frames, 2x2 tiles, parked", 6.0),
            ("encode, 3 latent frames, untiled", 1.0),
            ("encode, 3 latent frames, 2x2 tiles, parked", 1.0),
        )
    ]
    assert [check.holds for check in full_size_account.account_checks(rows)] == [True, False, True, True, True]
    found = speed.checks([speed.Ratio("a", 3.0, 2.0, 1.6), speed.Ratio("b", 3.0, 2.0, 1.5)], 0.01, 0.6)
    assert [check.holds for check in found] == [False, True, True, False]


def test_the_tiny_transformer_has_the_tokens_that_it_says() -> None:
    assert speed.TOKENS_PER_FRAME == 132
