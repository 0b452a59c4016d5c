"""From a clip to what Stage II learns from: latents of the truth and of several hybrid references (paper, Stage II).

The references are made as inference makes them: the clip's first frame is the image, the clip reduced to Stage I's size
is redrawn by Stage I (`transition.py`) and becomes the motion reference. Without transition it is the reduced clip
itself, which is what Stage II would meet if Stage I were perfect.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceMode, ReferenceOptions
from swifti2v.training.refiner.segment_flow import LATENTS, PROMPT, REFERENCE
from swifti2v.training.refiner.transition import TransitionOptions, lightly_denoised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.pipelines.loading import Parts
    from swifti2v.pipelines.stage_one import PromptEmbeds


class TrainingClip(Protocol):
    """What is encoded; `data.clips.Clip` is one."""

    @property
    def name(self) -> str:
        """Tells the clip from all others; the levels and the noise of its references follow from it."""

    @property
    def prompt(self) -> str:
        """Caption."""

    @property
    def frames(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """uint8 [F,H,W,3] at output size, F = 4k+1."""


@dataclass(frozen=True)
class EncodingOptions:
    """Which references of a clip are made.

    Args:
        transition: how Stage I redraws the clip; None: no references of this kind.
        unchanged: whether there is also a reference of the reduced clip as it is.
        modes: constructions of the hybrid reference; every motion reference is used in each of them.
        flow_scale: of `transport`.
        seed: of levels and noise.
    """

    transition: TransitionOptions | None = field(default_factory=TransitionOptions)
    unchanged: bool = False
    modes: tuple[ReferenceMode, ...] = ("transport", "replace")
    flow_scale: float = 0.5
    seed: int = 0


class StageTwoEncoder:
    """Encodes clips with the parts of a checkpoint; one clip is held in memory at a time.

    Args:
        parts: loaded; Stage II's transformer is not used.
        options: see `EncodingOptions`.
    """

    def __init__(self, parts: Parts, options: EncodingOptions) -> None:
        self.parts = parts
        self.options = options

    @torch.no_grad()
    def __call__(self, clip: TrainingClip) -> dict[str, Tensor]:
        """Return `latents` and ``reference.N`` [C,T,h,w] float16, and `prompt_embeds` [L,D] float16, on the CPU."""
        pixels = from_uint8(clip.frames)
        embeds = self.parts.stage_one.encode_prompt(clip.prompt)
        tensors = {LATENTS: self._encoded(_chunks(pixels)), PROMPT: embeds.prompt[0].to("cpu", torch.float16)}
        references = (
            self._encoded(
                hybrid_reference(
                    [motion],
                    pixels[0, :, 0],
                    options=ReferenceOptions(mode=mode, flow_scale=self.options.flow_scale),
                    device=self.parts.device,
                    temporal_factor=self.parts.stage_two.geometry.temporal,
                )
            )
            for motion in self.motion_references(clip, embeds)
            for mode in self.options.modes
        )
        return tensors | {f"{REFERENCE}{number}": latents for number, latents in enumerate(references)}

    def motion_references(self, clip: TrainingClip, prompt_embeds: PromptEmbeds) -> Iterator[Tensor]:
        """Yield the motion references of a clip, uint8 [F,h,w,3] at Stage I's size, the unchanged one first."""
        height, width = clip.frames.shape[1:3]
        reduced = torch.from_numpy(resized(clip.frames, self.parts.motion_size(Size(width, height))))
        if self.options.unchanged:
            yield reduced
        transition = self.options.transition
        if transition is None:
            return
        generator = torch.Generator("cpu").manual_seed(_seed_of(clip.name, self.options.seed))
        for _ in range(transition.num_variants):
            sigma = transition.draw(generator)
            seed = int(torch.randint(2**62, (1,), generator=generator))
            yield lightly_denoised(self.parts.stage_one, reduced, prompt_embeds, sigma=sigma, seed=seed)

    def _encoded(self, chunks: Iterator[Tensor]) -> Tensor:
        on_device = (chunk.to(self.parts.device) for chunk in chunks)
        latents = self.parts.stage_two.codec.encode_stream(on_device)
        return torch.cat([latent.to("cpu", torch.float16) for latent in latents], dim=2)[0]


def resized(
    frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], size: Size
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return frames uint8 [F,H,W,3] at `size` by Lanczos, the filter with which inference reduces the input image."""
    lanczos, sides = PIL.Image.Resampling.LANCZOS, (size.width, size.height)
    reduced = [PIL.Image.fromarray(frame).resize(sides, lanczos) for frame in frames]
    return np.stack([np.asarray(frame) for frame in reduced])


def _chunks(pixels: Tensor) -> Iterator[Tensor]:
    yield pixels[:, :, :1]
    yield from torch.split(pixels[:, :, 1:], 4, dim=2)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
