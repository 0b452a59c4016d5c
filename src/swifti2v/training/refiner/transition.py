"""Stage-transition (paper): motion references for training that carry the artifacts of Stage I.

A real clip, reduced to Stage I's size, is noised to a level sigma and denoised again by Stage I, first frame and prompt
given as at inference. It keeps the clip's motion, so that the clip stays the truth of Stage II, and has the texture of
what Stage I makes. The range of sigma is not published: near 0 nothing of Stage I shows, near 1 the motion is Stage I's
own and no longer the clip's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL.Image
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import retrieve_latents

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.pixels import from_uint8, to_uint8
from swifti2v.sampling.schedules import FEW_STEP_SIGMAS
from swifti2v.schedulers import FixedSigmaScheduler
from swifti2v.stage_one import borrowed

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.stage_one import PromptEmbeds, StageOne


@dataclass(frozen=True)
class TransitionOptions:
    """How far Stage I may redraw a training clip.

    Args:
        sigma_low, sigma_high: range of the noise level, within (0, 1).
        on_schedule: draw only levels of the few-step schedule, the ones that a distilled Stage I was trained at; the
            range must then hold one of them. Otherwise the level is uniform in the range.
        num_variants: references made of one clip, each at a level of its own.

    Raises:
        ConfigurationError: the range is empty, or holds no level of the schedule.
    """

    sigma_low: float = 0.6
    sigma_high: float = 0.95
    on_schedule: bool = True
    num_variants: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.sigma_low <= self.sigma_high < 1:
            msg = f"sigmas {self.sigma_low} .. {self.sigma_high} are no range within (0, 1); give low <= high"
            raise ConfigurationError(msg)
        if self.on_schedule and not self.levels:
            msg = (
                f"no level of the few-step schedule {FEW_STEP_SIGMAS} lies in {self.sigma_low} .. {self.sigma_high}; "
                f"widen the range, or set on_schedule to false"
            )
            raise ConfigurationError(msg)
        if self.num_variants < 1:
            msg = f"num_variants is {self.num_variants}; use at least 1"
            raise ConfigurationError(msg)

    @property
    def levels(self) -> tuple[float, ...]:
        """Levels of the few-step schedule within the range."""
        return tuple(sigma for sigma in FEW_STEP_SIGMAS if self.sigma_low <= sigma <= self.sigma_high)

    def draw(self, generator: torch.Generator) -> float:
        """Draw a level."""
        if self.on_schedule:
            return self.levels[int(torch.randint(len(self.levels), (1,), generator=generator))]
        span = self.sigma_high - self.sigma_low
        return self.sigma_low + span * float(torch.rand(1, generator=generator, dtype=torch.float64))


def light_schedule(sigma: float) -> tuple[float, ...]:
    """Return the few-step schedule from `sigma` on, without the final 0: `sigma`, then the levels below it."""
    return (sigma, *(level for level in FEW_STEP_SIGMAS if level < sigma - 1e-6))


@torch.no_grad()
def lightly_denoised(
    stage_one: StageOne, frames: Tensor, prompt_embeds: PromptEmbeds, *, sigma: float, seed: int
) -> Tensor:
    """Noise a clip to `sigma` in Stage I's latents and let Stage I denoise it, in few steps and without guidance.

    Args:
        stage_one: with its few-step adapters; at most `window_frames` frames are made at once.
        frames: uint8 [F,h,w,3] at Stage I's size, F = 4k+1.
        prompt_embeds: of the clip's caption.
        sigma: noise level in (0, 1).
        seed: of the noise.

    Returns:
        uint8 [F,h,w,3] on the CPU.

    Raises:
        InvalidInputError: the clip is longer than a window of Stage I, or its sides do not divide.
    """
    pipeline = stage_one.pipeline
    num_frames, height, width, _ = frames.shape
    if len(stage_one.plan(num_frames)) > 1:
        msg = f"a clip of {num_frames} frames is longer than Stage I's {stage_one.window_frames}; cut it"
        raise InvalidInputError(msg)
    clean = _latents(pipeline, frames)
    noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(seed))
    noisy = torch.lerp(clean, noise.to(clean.device), sigma)
    schedule = light_schedule(sigma)
    with borrowed(pipeline):
        pipeline.scheduler = FixedSigmaScheduler(fixed_sigmas=schedule)
        (video,) = pipeline(
            image=PIL.Image.fromarray(frames[0].numpy()),
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=len(schedule),
            guidance_scale=1.0,
            latents=noisy,
            prompt_embeds=prompt_embeds.prompt,
            max_sequence_length=stage_one.max_sequence_length,
            output_type="pt",
            return_dict=False,
        )
    return to_uint8(video.to("cpu", torch.float32).permute(0, 2, 1, 3, 4) * 2 - 1)


def _latents(pipeline: object, frames: Tensor) -> Tensor:
    """Encode uint8 [F,h,w,3] to normalized latents, float32 [1,C,T,h',w'], as the pipeline encodes its condition."""
    vae = pipeline.vae  # type: ignore[attr-defined]
    pixels = from_uint8(frames.numpy()).to(vae.device, vae.dtype)
    latents = retrieve_latents(vae.encode(pixels), sample_mode="argmax").float()
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / deviation
