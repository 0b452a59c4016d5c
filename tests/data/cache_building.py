"""A stand-in for the codec, and what tests of the latent cache say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from swifti2v.data.latent_cache import CacheOptions, LatentCache, build_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.data.clips import Clip, ClipRequest

DESCRIPTION = {"codec": "c1", "settings": {"dtype": "float32"}}
SMALL_SHARDS = CacheOptions(max_shard_samples=2, reader_threads=0)


def encode(clip: Clip) -> dict[str, torch.Tensor]:
    """A stand-in for the codec that tells clip and frame order: the mean of each frame."""
    means = torch.from_numpy(clip.frames.astype(np.float32).mean((1, 2)))
    return {
        "latents": means.T[:, :, None, None].contiguous(),
        "prompt_embeds": torch.full((2, 3), float(len(clip.prompt))),
    }


def build(requests: list[ClipRequest], folder: Path, **changes: Any) -> LatentCache:
    arguments: dict[str, Any] = {"encode": encode, "description": DESCRIPTION, "options": SMALL_SHARDS}
    return build_cache(requests, folder, **(arguments | changes))


def contents(cache: LatentCache) -> dict[str, Any]:
    return {
        sample.name: (sample.prompt, sample.bucket, {name: tensor.tolist() for name, tensor in sample.tensors.items()})
        for sample in (cache[index] for index in range(len(cache)))
    }


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()}


class Counting:
    """An encoder that counts, and does something at the nth clip."""

    def __init__(self, at: int = 10**9, then: Callable[[], None] = lambda: None) -> None:
        self.names: list[str] = []
        self.at, self.then = at, then

    def __call__(self, clip: Clip) -> dict[str, torch.Tensor]:
        if len(self.names) == self.at:
            self.then()
        self.names.append(clip.name)
        return encode(clip)
