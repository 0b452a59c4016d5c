"""Inputs of a tiny Stage II transformer, and how close two outputs have to be."""

from __future__ import annotations

from typing import Any

import torch

CHANNELS = 6
TOKENS_PER_FRAME = 6  # 4x6 latents in patches of 2x2
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def make_inputs(batch: int = 2, frames: int = 3, channels: int = CHANNELS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    timestep = torch.rand(batch, frames, generator=generator) * 1000
    timestep[:, 0] = 0
    return {
        "hidden_states": torch.randn(batch, channels, frames, 4, 6, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
    }


@torch.no_grad()
def run(network: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return network(**inputs, **more).sample


def per_token(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same request in the form that diffusers' class takes."""
    return inputs | {"timestep": inputs["timestep"].repeat_interleave(TOKENS_PER_FRAME, dim=1)}
