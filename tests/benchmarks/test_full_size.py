"""The full-size benchmark counts what the account counts, at a small size; its networks are those of the preset."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size_account, full_size_networks
from swifti2v.geometry import Size
from swifti2v.memory.budget import WAN22
from swifti2v.memory.codec_cost import WAN22_VAE
from swifti2v.memory.light_cost import LightDecoderDimensions
from swifti2v.memory.transformer_cost import STAGE_TWO_5B
from swifti2v.segments import FrameKind


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def test_codecs_are_those_of_the_preset() -> None:
    assert (
        parameters(full_size_networks.codec(full_size_networks.VAE21, "meta")) == WAN22.stage_one_codec.num_parameters
    )
    assert parameters(full_size_networks.codec(full_size_networks.VAE22, "meta")) == WAN22_VAE.num_parameters


@pytest.mark.slow
def test_rows_hold_the_flops_of_the_account() -> None:
    size = Size(256, 128)
    codec = full_size_networks.codec(full_size_networks.VAE22, "meta")
    encode, decode = full_size_account._codec_rows(codec, size, None, num_chunks=3)
    assert encode.tflop == pytest.approx(WAN22_VAE.encode_tflop(size, 9), rel=1e-3)
    assert decode.tflop == pytest.approx(WAN22_VAE.decode_tflop(size, 9), rel=1e-3)
    light = full_size_account._light_row(size, wide=False, num_chunks=3)
    assert light.tflop == pytest.approx(LightDecoderDimensions().decode_tflop(size, 9), rel=1e-9)
    row = full_size_account._stage_two_row(size, 5)
    assert row.tflop == pytest.approx(STAGE_TWO_5B.forward_cost(5 * 32, num_timesteps=5).tflop, rel=1e-3)
    network = full_size_networks.stage_two("meta")
    kinds = len(FrameKind) * STAGE_TWO_5B.dim  # a table of ours, which the account leaves out
    assert parameters(network) - kinds == STAGE_TWO_5B.num_parameters
    assert next(network.parameters()).dtype == torch.bfloat16
