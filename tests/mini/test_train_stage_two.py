"""Pairs and objective of Stage II: the decibels are those of pixels, and there is something to learn."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from swifti2v.evaluation.metrics import psnr
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.mini.reference_pairs import ReferencePair, read_clip
from swifti2v.mini.train_stage_two import (
    StageTwoObjective,
    StageTwoRecipe,
    fit_block_codec,
    make_stage_two_transformer,
)
from swifti2v.pixels import to_uint8
from swifti2v.training.refiner.windows import WindowOptions

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = StageTwoRecipe(
    num_channels=768,
    width=128,
    num_layers=1,
    ffn_width=64,
    local_detail_width=32,
    batch_size=2,
    crops=((8, 8),),
    pure_noise_share=1.0,
)


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """Waves that move, [1,3,13,64,64] in [-1,1]."""
    y, x = torch.meshgrid(torch.linspace(0, 9, 64), torch.linspace(0, 9, 64), indexing="ij")
    frames = [torch.stack([torch.sin(3 * x + t), torch.cos(4 * y - t), torch.sin(2 * x + 2 * y)]) for t in range(13)]
    return torch.stack(frames, dim=1)[None] * 0.8


def make_objective(clip: torch.Tensor, reference: torch.Tensor) -> StageTwoObjective:
    chunks = [clip[:, :, :1], *torch.split(clip[:, :, 1:], 4, dim=2)]
    # A little noise: principal components of fewer samples than numbers would not span them.
    noisy = [chunk + 0.01 * torch.randn(chunk.shape, generator=torch.Generator().manual_seed(0)) for chunk in chunks]
    codec = fit_block_codec(noisy, num_channels=RECIPE.num_channels)

    def latents(video: torch.Tensor) -> torch.Tensor:
        pieces = [video[:, :, :1], *torch.split(video[:, :, 1:], 4, dim=2)]
        return torch.cat(list(codec.encode_stream(pieces)), dim=2)[0]

    pair = ReferencePair(truth=latents(clip), reference=latents(reference))
    return StageTwoObjective(RECIPE, codec=codec, transformer=make_stage_two_transformer(RECIPE), pairs=[pair])


def test_decibels_are_those_of_pixels(clip: torch.Tensor) -> None:
    """A reference that is wrong by 0.1 everywhere is 26.02 dB below the peak of 2, in latents as in pixels."""
    objective = make_objective(clip, clip + 0.1)
    _, numbers = objective.loss(0)
    pixels = psnr(to_uint8(clip[:, :, :1])[0].numpy(), to_uint8(clip[:, :, :1] + 0.1)[0].numpy())
    assert numbers["reference_decibels"] == pytest.approx(26.02, abs=0.05)
    assert numbers["reference_decibels"] == pytest.approx(pixels, abs=0.2)
    assert numbers["gained"] == 0.0  # untrained, the network returns its reference


def test_a_few_steps_gain_decibels(clip: torch.Tensor) -> None:
    objective = make_objective(clip, 0.9 * clip)
    optimizer = torch.optim.Adam(objective.module.parameters(), lr=3e-3)
    for step in range(25):
        loss, numbers = objective.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert numbers["gained"] > 1.0


def test_loss_is_a_function_of_the_step(clip: torch.Tensor) -> None:
    objective = make_objective(clip, 0.9 * clip)
    first, second = objective.loss(3)[0], objective.loss(3)[0]
    assert torch.equal(first, second)
    assert any(not torch.equal(first, objective.loss(step)[0]) for step in range(4, 10))


@pytest.mark.parametrize("segments", [0, 1, 2])
def test_own_context_is_made_without_gradient(clip: torch.Tensor, segments: int) -> None:
    """A forward for each segment before the window, of which a clip of four latent frames has two at M = 1."""
    calls: list[bool] = []
    objective = make_objective(clip, 0.9 * clip)
    objective.module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    objective.recipe = replace(RECIPE, own_context_share=min(segments, 1), own_context_segments=max(segments, 1))
    objective._windows = WindowOptions(segment_size=1)
    drawn = [objective._batch(step) for step in range(8)]
    assert {len(each.earlier) for each in drawn} == ({0} if segments == 0 else set(range(1, segments + 1)))
    assert all(each.segment.before for each in drawn if each.earlier)
    objective.loss(0)
    assert calls == [False] * len(drawn[0].earlier) + [True]


def test_heads_and_context_are_those_of_the_recipe() -> None:
    network = make_stage_two_transformer(replace(RECIPE, width=192, head_width=64, context_attention="frozen"))
    assert (network.config.num_attention_heads, network.config.attention_head_dim) == (3, 64)
    assert network.config.context_attention == "frozen"


def test_wide_clips_are_reduced_and_narrow_ones_are_not(tmp_path: Path) -> None:
    """Stripes of 4 pixels: gone to gray at an eighth of the width, whole at their own."""
    stripes = np.zeros((5, 64, 256, 3), dtype=np.uint8)
    stripes[:, :, (np.arange(256) // 4) % 2 == 0] = 255
    with VideoWriter(tmp_path / "clip.mp4", size=Size(256, 64), fps=8) as writer:
        writer.write(stripes)
    whole = read_clip(tmp_path / "clip.mp4", num_frames=5, multiple=8, max_width=256)
    small = read_clip(tmp_path / "clip.mp4", num_frames=5, multiple=8, max_width=32)
    assert (whole.shape, small.shape) == ((5, 64, 256, 3), (5, 8, 32, 3))
    assert whole.std() > 100
    assert small.std() < 10
