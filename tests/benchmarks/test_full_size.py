"""The full-size benchmark counts what the account counts, at a small size; its networks are those of the preset."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size_account, full_size_networks
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
