"""Fine detail beside the tokens: each latent cell is corrected from its neighbors.

A token of `mini` covers 4x4 cells of 192 numbers and is 256 wide: it carries only a few numbers for each cell, enough
to say what to trust and where light changes, too few to sharpen an edge. Two small convolutions over the reference do
that; tokens remain for what needs the rest of the picture (`docs/log.md`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


class LocalDetail(nn.Module):
    """Correction [B,C,F,h,w] of a cell from the 3x3 cells of its reference [B,R,F,h,w]; zero before training.

    Args:
        reference_channels: R.
        out_channels: C.
        width: hidden channels.
    """

    def __init__(self, reference_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.gather = nn.Conv3d(reference_channels, width, (1, 3, 3), padding=(0, 1, 1))
        self.correct = nn.Conv3d(width, out_channels, 1)
        nn.init.zeros_(self.correct.weight)
        if self.correct.bias is not None:
            nn.init.zeros_(self.correct.bias)

    def forward(self, reference: Tensor) -> Tensor:
        """Return the correction; dtype of `reference`. Frames do not see each other."""
        correction: Tensor = self.correct(F.gelu(self.gather(reference)))
        return correction

    def add_to(self, sample: Tensor, reference: Tensor) -> None:
        """Add the correction to `sample` in place, frame by frame: at 2560x1408 one has 57 MB of hidden channels."""
        for place, frame in enumerate(torch.split(reference, 1, dim=2)):
            sample[:, :, place : place + 1] += self(frame)
