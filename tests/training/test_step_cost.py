"""Costs of a step, measured without memory, against PyTorch's counts of a real step of the whole network."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.memory.live_bytes import LiveBytes
from swifti2v.memory.networks import EXPERT, Network
from swifti2v.training.step_cost import LORA_TARGETS, TrainedNetwork, measured_bytes, measured_flops

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 36, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 5, "rope_max_seq_len": 64,
}  # fmt: skip
SHAPE, TEXT, RANK = (2, 3, 8, 8), 7, 4
TOKENS = 2 * 3 * 16


def real(*, lora: bool, checkpointing: bool) -> WanTransformer3DModel:
    network = WanTransformer3DModel(**SIZES).train()
    if lora:
        network.requires_grad_(False).to(torch.bfloat16)
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LORA_TARGETS)))
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


def step(network: WanTransformer3DModel) -> None:
    batch, frames, height, width = SHAPE
    inputs = torch.randn(batch, 36, frames, height, width), torch.full((batch,), 500.0), torch.randn(batch, TEXT, 32)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        (made,) = network(*inputs, return_dict=False)
    made.float().square().mean().backward()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_and_weights_are_those_of_the_whole_network(lora: bool, checkpointing: bool) -> None:
    trained = TrainedNetwork(Network.of(EXPERT, SIZES), RANK * lora, gradient_checkpointing=checkpointing)
    network, counter = real(lora=lora, checkpointing=checkpointing), FlopCounterMode(display=False)
    with counter:
        step(network)
    # PyTorch's counter knows no fused attention on CPUs: two products forward, four backward, two more again.
    pairs = 2 * (48 * 48 + 48 * TEXT) * 32
    attention = 5 * 2 * 2 * pairs * (3 + checkpointing)
    flops = measured_flops(trained, SHAPE, text_tokens=TEXT)
    assert flops.step * 1e12 == pytest.approx(counter.get_total_flops() + attention, rel=1e-6)
    found = measured_bytes(trained, SHAPE, text_tokens=TEXT)
    assert found.num_trained == sum(each.numel() for each in network.parameters() if each.requires_grad)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_activations_are_those_that_live_at_the_peak_of_a_real_step() -> None:
    for checkpointing in (False, True):
        trained = TrainedNetwork(Network.of(EXPERT, SIZES), RANK, gradient_checkpointing=checkpointing)
        network = real(lora=True, checkpointing=checkpointing)
        with LiveBytes() as live:
            step(network)
        found = measured_bytes(trained, SHAPE, text_tokens=TEXT)
        kept = found.activations + 4 * found.num_trained  # the real step keeps its gradients
        assert kept == pytest.approx(live.peak_bytes, rel=0.1)
