"""Fit the linear codecs of `mini`: principal components, in seconds, without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swifti2v.errors import InvalidInputError
from swifti2v.mini.transform_codec import BLOCK_NUMBERS, TEMPORAL, BlockTransform, to_bands

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class BandStatistics:
    """Sums over blocks from which a `BlockTransform` is fitted; feed it chunks, then ask for the transform.

    Args:
        blocks_per_chunk: blocks drawn at random from each chunk, so that no clip dominates.
        centered: subtract the mean of the lowest band (pictures) or not (residuals, whose mean is zero).
    """

    def __init__(self, *, blocks_per_chunk: int = 3000, centered: bool = True, seed: int = 0) -> None:
        self._second_moments = torch.zeros(TEMPORAL, BLOCK_NUMBERS, BLOCK_NUMBERS, dtype=torch.float64)
        self._sum = torch.zeros(BLOCK_NUMBERS, dtype=torch.float64)
        self._counts = torch.zeros(TEMPORAL, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks_per_chunk = blocks_per_chunk
        self._centered = centered

    def add(self, chunks: Iterable[Tensor]) -> None:
        """Count in chunks [B,3,f,H,W]; a still (f = 1) counts for the lowest band only."""
        for chunk in chunks:
            blocks_NTP = to_bands(chunk).flatten(0, 2)
            chosen = torch.randperm(len(blocks_NTP), generator=self._generator)[: self._blocks_per_chunk]
            blocks_NTP = blocks_NTP[chosen].double()
            bands = 1 if chunk.shape[2] == 1 else TEMPORAL
            self._sum += blocks_NTP[:, 0].sum(0)
            for band in range(bands):
                self._second_moments[band] += blocks_NTP[:, band].T @ blocks_NTP[:, band]
                self._counts[band] += len(blocks_NTP)

    def best_band_channels(self, num_channels: int) -> tuple[int, ...]:
        """Split `num_channels` over the bands so that the kept variance is largest."""
        variances = torch.stack([self._components(band)[0] for band in range(TEMPORAL)])
        chosen = variances.flatten().argsort(descending=True)[:num_channels] // BLOCK_NUMBERS
        return tuple(int((chosen == band).sum()) for band in range(TEMPORAL))

    def fit(self, band_channels: Sequence[int]) -> tuple[BlockTransform, Tensor]:
        """Return the transform and the standard deviation of each of its channels [C] float32."""
        transform = BlockTransform(band_channels)
        bases, deviations = [], []
        for band, count in enumerate(band_channels):
            variances, components = self._components(band)
            bases.append(components[:, :count])
            deviations.append(variances[:count].clamp(min=1e-12).sqrt())
        transform.basis.copy_(torch.cat(bases, dim=1))
        if self._centered:
            transform.mean.copy_(self._sum / self._counts[0])
        return transform, torch.cat(deviations).float()

    def _components(self, band: int) -> tuple[Tensor, Tensor]:
        if not self._counts[band]:
            if band == 0:
                msg = "no blocks were counted; feed chunks to BandStatistics.add before fitting"
                raise InvalidInputError(msg)
            return torch.zeros(BLOCK_NUMBERS, dtype=torch.float64), torch.eye(BLOCK_NUMBERS, dtype=torch.float64)
        covariance = self._second_moments[band] / self._counts[band]
        if band == 0 and self._centered:
            mean = self._sum / self._counts[0]
            covariance = covariance - torch.outer(mean, mean)
        variances, components = torch.linalg.eigh(covariance)
        return variances.flip(0), components.flip(1)
