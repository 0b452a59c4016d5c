"""Short runs of a tiny Stage I, and what is to be seen of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch

from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.stage_one import StageOne

from swifti2v.settings import GenerationSettings
from swifti2v.wan.checkpoint_index import WAN_NEGATIVE_PROMPT

SIZE = Size(32, 16)
TEXT_LENGTH = 16


def make_image(seed: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def make(stage_one: StageOne, image: PIL.Image.Image, **changes) -> torch.Tensor:
    return torch.cat(list(pieces(stage_one, image, **changes)))


def pieces(stage_one: StageOne, image: PIL.Image.Image, **changes) -> Iterator[torch.Tensor]:
    """Begin a run; `changes` are a prompt, `on_step` and settings."""
    prompt, on_step, size = changes.pop("prompt", "pan left"), changes.pop("on_step", None), changes.pop("size", SIZE)
    settings = GenerationSettings(**{"num_frames": 1, "seed": 3} | changes)
    return stage_one.generate(image, prompt, settings, size=size, on_step=on_step)


def many_steps(num_steps: int, **changes) -> dict[str, object]:
    """Return the settings of the undistilled network, as an index has them."""
    guided = {"stage_one_guidance_scale": 3.5, "negative_prompt": WAN_NEGATIVE_PROMPT}
    return {"few_step": False, "stage_one_steps": num_steps} | guided | changes


@contextmanager
def watched(*modules):
    """Record the timestep of every forward call of each module."""
    timesteps = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs["timestep"]), with_kwargs=True
        )
        for module, seen in zip(modules, timesteps, strict=True)
    ]
    try:
        yield timesteps
    finally:
        for handle in handles:
            handle.remove()
