"""Numbers that Wan's own code gave for a tiny network, pinned: Stage II by `training-free` is its image-to-video.

Had from `WanTI2V.i2v` of Wan-Video/Wan2.2 at 42bf4cf (masked timesteps, the first latent put back after each step) with
these weights, this noise and this text, in float32 on a CPU; in place of its solvers stood Euler's four steps, shift 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import sample_segments
from swifti2v.segments import plan_segments
from swifti2v.wan.condition import predict_targets
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.sampling.segmented import Window

SHAPE = (1, 48, 1, 4, 6)
# (channel, latent frame, row, column) of the final latents -> value
OFFICIAL = {
    (0, 0, 0, 0): 0.479426,
    (0, 1, 0, 0): -0.563404,
    (7, 1, 3, 5): 2.408569,
    (13, 2, 1, 2): -2.035649,
    (21, 2, 2, 4): 2.421655,
    (30, 3, 0, 3): 0.466682,
    (39, 3, 3, 1): 1.212770,
    (44, 4, 1, 5): 2.877834,
    (47, 4, 3, 5): 2.157448,
}
OFFICIAL_SQUARE_SUM = 17209.18361840819


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.0) -> Tensor:
    """Numbers that need no generator."""
    count = torch.Size(shape).numel()
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + phase).float() * scale).reshape(shape)


def network() -> StageTwoTransformer:
    """A network whose weights are waves, one for each name in alphabetical order."""
    made = StageTwoTransformer(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, ffn_dim=96, num_layers=2
    ).eval()
    names = sorted(name for name, _ in made.named_parameters() if name != "frame_kind_table")
    with torch.no_grad():
        for phase, name in enumerate(names):
            weight = made.get_parameter(name)
            values = wave(tuple(weight.shape), phase, 0.3 if weight.ndim < 3 else 0.1)
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(values + 1 if is_norm else values)
    return made


def final_latents(made: StageTwoTransformer) -> Tensor:
    """Run one segment that covers a clip of five latent frames from pure noise; return ``[48, 5, 4, 6]``."""
    anchor = wave(SHAPE, 0.5)
    text = torch.cat([wave((1, 7, 32), 2.0), torch.zeros(1, 505, 32)], dim=1)

    def denoise(window: Window, targets: Tensor, sigma: float) -> Tensor:
        return predict_targets(
            made,
            segment=window.segment,
            reference=window.reference,
            targets=targets,
            sigma=sigma,
            prompt_embeds=text,
        )

    plan = plan_segments(5, segment_size=4, neighbors_before=0)
    frames = [anchor, *(torch.zeros(SHAPE) for _ in range(4))]
    sampled = sample_segments(frames, plan, denoise=denoise, sigmas=shifted_sigmas(4, shift=5.0), seed=11)
    return torch.cat([anchor, *(targets for _, targets in sampled)], dim=2)[0]


def test_one_segment_gives_the_latents_of_wans_own_code() -> None:
    latents = final_latents(network())
    for place, value in OFFICIAL.items():
        assert float(latents[place]) == pytest.approx(value, abs=1e-4), place
    assert float(latents.double().square().sum()) == pytest.approx(OFFICIAL_SQUARE_SUM, rel=1e-5)
