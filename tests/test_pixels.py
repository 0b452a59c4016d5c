"""Pixels keep their levels on the way to float and back."""

from __future__ import annotations

import torch

from swifti2v.pixels import from_uint8, to_uint8


def test_every_level_survives_the_way_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    pixels = from_uint8(levels)
    assert pixels.shape == (1, 3, 2, 16, 16)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(pixels, (levels.permute(3, 0, 1, 2)[None].float() / 127.5) - 1)
    assert torch.equal(to_uint8(pixels), levels)
    assert torch.equal(from_uint8(levels.numpy()), pixels)


def test_levels_beyond_the_range_are_clamped_and_ties_go_to_even() -> None:
    beyond = torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1, 1)
    assert to_uint8(beyond).flatten().tolist() == [0, 255, 128]
