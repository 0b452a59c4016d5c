"""From a clip to what an expert of Stage I learns from: latents, condition and prompt, as inference has them.

Condition and prompt come from the methods of diffusers' own pipeline, so that what is trained is what is sampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from swifti2v.pixels import from_uint8
from swifti2v.wan.streaming import open_codec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LATENTS, CONDITION, PROMPT = "latents", "condition", "prompt_embeds"
PATCH = 2  # of every Wan transformer


class TrainingClip(Protocol):
    """What is encoded; `data.clips.Clip` is one."""

    @property
    def prompt(self) -> str:
        """Caption."""

    @property
    def frames(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """uint8 [F,H,W,3] at Stage I's size, F = 4k+1."""


class LowResEncoder:
    """Encodes clips with codec and text encoder of a `WanImageToVideoPipeline`; its transformers may be None.

    Args:
        pipeline: diffusers' pipeline; codec and text encoder are used where they are.
        max_sequence_length: to which prompts are padded, as at inference.
    """

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512) -> None:
        self._pipeline = pipeline
        self._codec = open_codec(pipeline.vae)
        self._max_sequence_length = max_sequence_length

    @property
    def size_multiple(self) -> int:
        """What both sides of a clip are multiples of: the codec's factor times the transformer's patch of 2."""
        return PATCH * self._codec.spatial_factor

    @torch.no_grad()
    def __call__(self, clip: TrainingClip) -> dict[str, Tensor]:
        """Return float16 tensors on the CPU.

        Returns:
            `latents` [16,T,h,w], normalised; `condition` [20,T,h,w]: mask of the first frame (4) and latents of image
            and empty frames (16); `prompt_embeds` [L,D].
        """
        device = self._pipeline.vae.device
        pixels = from_uint8(clip.frames).to(device)
        num_frames, height, width = pixels.shape[2:]
        chunks = [pixels[:, :, :1], *torch.split(pixels[:, :, 1:], self._codec.temporal_factor, dim=2)]
        latents = torch.cat(list(self._codec.encode_stream(iter(chunks))), dim=2)
        _, condition = self._pipeline.prepare_latents(
            pixels[:, :, 0],
            batch_size=1,
            num_channels_latents=latents.shape[1],
            height=height,
            width=width,
            num_frames=num_frames,
            dtype=torch.float32,
            device=device,
            latents=latents,
        )
        prompt, _ = self._pipeline.encode_prompt(
            clip.prompt, do_classifier_free_guidance=False, max_sequence_length=self._max_sequence_length
        )
        tensors = {LATENTS: latents, CONDITION: condition, PROMPT: prompt}
        return {name: tensor[0].to("cpu", torch.float16) for name, tensor in tensors.items()}
