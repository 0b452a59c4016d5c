"""Numbers that Wan's own code gave for tiny experts, pinned: Stage I in many steps is its image-to-video.

Had from `WanI2V.generate` of Wan-Video/Wan2.2 at 42bf4cf (``wan/image2video.py``, its `FlowUniPCMultistepScheduler`, 40
steps, shift 5, boundary 0.9, guidance 3 at low noise and 4 at high noise), in float32 on a CPU, with these experts in
place of its networks, this noise, this image latent and these texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel

from swifti2v.pipelines.stage_one import borrowed

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

SHAPE = (1, 16, 3, 4, 6)
"""Of the latents: nine frames of 48x32."""
TOKENS = 7
# fmt: off
OFFICIAL_TIMESTEPS = [
    999, 994, 989, 983, 978, 972, 965, 959, 952, 944, 937, 929, 920, 911, 902, 892, 882, 870, 859, 846,
    833, 818, 803, 786, 768, 749, 728, 706, 681, 654, 624, 591, 555, 514, 468, 416, 356, 288, 208, 113,
]
# fmt: on
"""Whole numbers, int64; the first 15 went to the high-noise expert, the others to the low-noise one."""
OFFICIAL_HIGH_NOISE_STEPS = 15
# (channel, latent frame, row, column) of the final latents -> value
OFFICIAL = {
    (0, 0, 0, 0): -0.668836,
    (1, 0, 3, 5): -2.298456,
    (4, 1, 1, 2): 1.030181,
    (7, 2, 2, 4): 1.846203,
    (10, 0, 1, 3): 0.693992,
    (13, 1, 3, 1): 1.706024,
    (14, 2, 0, 5): 2.808226,
    (15, 2, 3, 5): -2.046162,
}
OFFICIAL_SQUARE_SUM = 3914.136871824549


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.0) -> Tensor:
    """Numbers that need no generator."""
    count = torch.Size(shape).numel()
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + phase).float() * scale).reshape(shape)


def expert(phase: float) -> WanTransformer3DModel:
    """A network whose weights are waves, one for each name in alphabetical order."""
    made = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        for index, name in enumerate(sorted(name for name, _ in made.named_parameters())):
            weight = made.get_parameter(name)
            values = wave(tuple(weight.shape), index + phase, 0.3 if weight.ndim < 3 else 0.1)
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(values + 1 if is_norm else values)
    return made


def image_condition() -> Tensor:
    """The mask of the first frame, four channels, and the latents of the image: ``[1, 20, 3, 4, 6]``."""
    mask = torch.zeros(1, 4, *SHAPE[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, wave(SHAPE, 0.5)], dim=1)


class Experts(WanImageToVideoPipeline):
    """Diffusers' pipeline, its latents and its image given instead of drawn and encoded."""

    def prepare_latents(self, *_arguments: Any, **_keywords: Any) -> tuple[Tensor, Tensor]:
        return wave(SHAPE, 1.5), image_condition()


def texts() -> tuple[Tensor, Tensor]:
    """A prompt and a negative prompt as the network reads them."""
    return wave((1, TOKENS, 32), 2.0), wave((1, TOKENS, 32), 3.0)


@pytest.fixture
def pipeline(tiny_vae21: AutoencoderKLWan) -> WanImageToVideoPipeline:
    return Experts(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae21,  # asked for its number of channels only
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=expert(0.0),
        transformer_2=expert(0.25),
        boundary_ratio=0.9,
    )


def final_latents(pipeline: WanImageToVideoPipeline) -> Tensor:
    """Run the pipeline as `StageOne` does; return ``[16, 3, 4, 6]``."""
    prompt, negative = texts()
    with torch.no_grad(), borrowed(pipeline, few_step=False, flow_shift=5.0):
        (latents,) = pipeline(
            image=torch.zeros(1, 3, 32, 48),
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=40,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            output_type="latent",
            return_dict=False,
        )
    return latents[0]


def test_many_steps_give_the_latents_of_wans_own_code(pipeline: WanImageToVideoPipeline) -> None:
    seen: list[tuple[int, Tensor]] = []
    for number, network in enumerate((pipeline.transformer, pipeline.transformer_2)):
        network.register_forward_pre_hook(
            lambda _module, _arguments, keywords, number=number: seen.append((number, keywords["timestep"])),
            with_kwargs=True,
        )
    latents = final_latents(pipeline)
    with_prompt = seen[::2]  # every other one is the negative prompt's
    assert [int(timestep) for _, timestep in with_prompt] == OFFICIAL_TIMESTEPS
    assert {timestep.dtype for _, timestep in seen} == {torch.int64}
    assert [number for number, _ in with_prompt] == [0] * OFFICIAL_HIGH_NOISE_STEPS + [1] * 25
    for place, value in OFFICIAL.items():
        assert float(latents[place]) == pytest.approx(value, abs=1e-4), place
    assert float(latents.double().square().sum()) == pytest.approx(OFFICIAL_SQUARE_SUM, rel=1e-5)
