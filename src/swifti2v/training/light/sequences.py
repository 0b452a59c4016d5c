"""Sequences of training: where streams through the prepared items begin, and the cuts that the network sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from swifti2v.errors import ConfigurationError
from swifti2v.light.inputs import GRID

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from swifti2v.training.light.pairs import Split

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
NO_FLIPS = (False, False, False)


@dataclass
class Stream:
    """A place of an item whose frames are trained on in order, step after step.

    Args:
        item: name of the item's folder.
        begin: frames already done.
        top, left: of the cut, in pixels of the work grid.
        flips: left to right, top to bottom, rows for columns.
        frame: the last frame made, [3, H, W], and None at the start.
        hidden: the hidden state that it left, [hidden, h, w].
    """

    item: str
    begin: int
    top: int
    left: int
    flips: tuple[bool, bool, bool]
    frame: Tensor | None = None
    hidden: Tensor | None = None


class Items:
    """The items of a split, mapped into memory.

    Raises:
        ConfigurationError: there is none.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.arrays: dict[str, Arrays] = {
            path.name: {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}
            for path in sorted(folder.glob(f"{split}-*"))
        }
        if not self.arrays:
            msg = f"{folder} holds no items of the split {split!r}; prepare them first"
            raise ConfigurationError(msg)
        self.names = list(self.arrays)
        # The variant 0 of each source is undamaged (`pairs.py`).
        self.clean = [index for index, name in enumerate(self.names) if name.endswith("_0")]

    def draw(self, rng: np.random.Generator, *, crop: int, length: int, clean_share: float) -> Stream:
        """Return where a new stream begins; half of them begin from the image."""
        index = int(rng.choice(self.clean)) if rng.random() < clean_share else int(rng.integers(len(self.names)))
        name = self.names[index]
        count, _, height, width = self.arrays[name]["flow"].shape
        begin = 0 if rng.random() < 0.5 else int(rng.integers(0, count - length + 1))
        top, left = int(rng.integers(0, height - crop + 1)), int(rng.integers(0, width - crop + 1))
        flips = rng.random(3) < 0.5
        return Stream(name, begin, top, left, (bool(flips[0]), bool(flips[1]), bool(flips[2])))

    def cut(self, stream: Stream, *, crop: int, length: int) -> dict[str, Tensor] | None:
        """Return the next `length` frames of a stream, or None where the item ends before."""
        arrays = self.arrays[stream.item]
        if stream.begin + length > len(arrays["flow"]):
            return None
        return read(arrays, stream.begin, length, stream.top, stream.left, crop, crop, flips=stream.flips)


def read(
    arrays: Arrays,
    begin: int,
    length: int,
    top: int,
    left: int,
    height: int,
    width: int,
    *,
    flips: tuple[bool, bool, bool] = NO_FLIPS,
) -> dict[str, Tensor]:
    """Cut a sequence out of the arrays of an item; sizes in pixels of the work grid (h, w), H = 4 h, W = 4 w.

    Returns:
        ``truth`` [length + 1, 3, H, W], ``base`` and ``detail`` [length, 3, H, W], ``evidence`` [length, C, h, w],
        ``flow`` [length, 2, h, w], ``first`` [1, 3, H, W]: the frame before them, which is the image or transported.
    """

    def cut(name: str, scale: int, first: int, last: int) -> Array:
        rows, columns = (slice(start * scale, (start + size) * scale) for start, size in ((top, height), (left, width)))
        return arrays[name][first:last, :, rows, columns]

    end, before = begin + length, max(begin - 1, 0)
    found = {
        "truth": cut("truth", GRID, begin, end + 1).astype(np.float32) / 127.5 - 1,
        "base": cut("base", GRID, before, end).astype(np.float32) / 127.5 - 1,
        "detail": cut("detail", GRID, before, end).astype(np.float32) / 127.5,
        "evidence": cut("evidence", 1, before, end).astype(np.float32) / 254,
        "flow": cut("flow", 1, begin, end).astype(np.float32),
    }
    if begin == 0:
        found["first"] = found["truth"][:1].copy()
    else:
        confidence = (found["evidence"][:1, :1] * 2).repeat(GRID, 2).repeat(GRID, 3)
        found["first"] = found["base"][:1] + confidence * found["detail"][:1]
        for name in ("base", "detail", "evidence"):
            found[name] = found[name][1:]
    found = _flipped(found, flips, is_square=height == width)
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def _flipped(found: dict[str, Array], flips: tuple[bool, bool, bool], *, is_square: bool) -> dict[str, Array]:
    if flips[0]:
        found = {name: values[..., ::-1] for name, values in found.items()}
        found["flow"] = found["flow"] * np.array([-1, 1], dtype=np.float32)[:, None, None]
    if flips[1]:
        found = {name: values[..., ::-1, :] for name, values in found.items()}
        found["flow"] = found["flow"] * np.array([1, -1], dtype=np.float32)[:, None, None]
    if flips[2] and is_square:
        found = {name: values.swapaxes(-1, -2) for name, values in found.items()}
        found["flow"] = found["flow"][:, ::-1]
    return found


def spoiled(first: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a frame [3, H, W] as a long run might have spoiled it: too sharp or too soft, its colors off."""
    blurred = F.avg_pool2d(F.pad(first[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    sharper = first + float(rng.uniform(-0.7, 1.2)) * (first - blurred)
    offsets = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.03), (1, 3, 3, 3)).astype(np.float32))
    return sharper + F.interpolate(offsets, size=first.shape[-2:], mode="bilinear", align_corners=False)[0]
