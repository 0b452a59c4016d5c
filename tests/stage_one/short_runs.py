"""Short runs of a tiny Stage I, and what is to be seen of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch

from swifti2v.geometry import Size

if TYPE_CHECKING:
    from swifti2v.stage_one import StageOne

SIZE = Size(32, 16)
TEXT_LENGTH = 16


def make_image(seed: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def make(stage_one: StageOne, image: PIL.Image.Image, **changes) -> torch.Tensor:
    settings = {"prompt": "pan left", "size": SIZE, "num_frames": 1, "seed": 3} | changes
    return torch.cat(list(stage_one.generate(image, **settings)))


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
