"""A tiny Stage I, the pipeline of diffusers that it drives, and an image of its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

from swifti2v.stage_one import StageOne
from tests.stage_one.short_runs import TEXT_LENGTH, make_image

if TYPE_CHECKING:
    import PIL.Image


@pytest.fixture
def pipeline(tiny_vae21, tiny_text_encoder, tiny_tokenizer, tiny_wan_dit) -> WanImageToVideoPipeline:
    high, low = tiny_wan_dit(36, 16), tiny_wan_dit(36, 16)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(1.1)  # the fixture seeds both alike; the experts must differ
    pipeline = WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer,
        text_encoder=tiny_text_encoder,
        vae=tiny_vae21,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=high,
        transformer_2=low,
        boundary_ratio=0.9,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stage_one(pipeline) -> StageOne:
    return StageOne(pipeline, window_frames=9, overlap_frames=5, max_sequence_length=TEXT_LENGTH)


@pytest.fixture
def image() -> PIL.Image.Image:
    return make_image(0)
