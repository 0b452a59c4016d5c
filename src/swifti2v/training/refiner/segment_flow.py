"""Stage II's objective at any size: restore the targets of random windows from noise, given anchor, neighbors, z_ref.

Flow matching on the targets only (paper, CSG): a velocity network minimizes ``|v - (noise - x0)|^2``, one that predicts
the residual to the reference ``|x0 - truth|^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swifti2v.training.refiner.windows import (
    WindowBatch,
    WindowSource,
    WindowSourceOptions,
    check_shares,
    noise_like,
    predicted,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.training.engine.samples import Batches, Samples
    from swifti2v.wan.transformer import StageTwoTransformer


@dataclass(frozen=True)
class SegmentFlowOptions(WindowSourceOptions):
    """How Stage II is trained by flow matching.

    Args:
        pure_noise_share: share of samples at sigma 1, where sampling begins.
        keep_reference_above: below this noise level the reference is left out in half of the samples, so that details
            come from the image rather than from the artifacts of the reference (HunyuanVideo-1.5's super-resolution
            drops its condition below 0.7); 0 keeps it always.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    pure_noise_share: float = 0.1
    keep_reference_above: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "pure_noise_share", "keep_reference_above")


class SegmentFlowObjective:
    """Restore the targets of random windows; the `Objective` of Stage II at any size.

    Args:
        transformer: a `StageTwoTransformer`; what of it is trained is what requires a gradient (all, or its LoRA).
        samples, batches, options, num_processes, empty_prompt: see `WindowSource`.
    """

    def __init__(
        self,
        transformer: StageTwoTransformer,
        *,
        samples: Samples,
        batches: Batches,
        options: SegmentFlowOptions,
        num_processes: int = 1,
        empty_prompt: Tensor | None = None,
    ) -> None:
        self.module: nn.Module = transformer
        self.options = options
        self._transformer = transformer
        self._source = WindowSource(
            transformer,
            samples=samples,
            batches=batches,
            options=options,
            num_processes=num_processes,
            empty_prompt=empty_prompt,
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a step and, for the log, the error of x0 beside that of the reference."""
        generator = self._source.generator(step)
        batch = self._source.batch(step, generator)
        clean = batch.targets
        sigma = self._sigmas(len(clean), generator).to(clean.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = torch.lerp(clean, noise_like(clean, generator), level)
        shown = self._without_some_references(batch, sigma, generator)
        error = (predicted(self._transformer, shown, noisy, sigma) - clean).square()
        weighted = error / level.square() if self._transformer.config.prediction_type == "velocity" else error
        reference = batch.reference[:, :, batch.segment.target_slice]
        numbers = {
            "samples": float(len(clean)),
            "tokens": float(_num_tokens(self._transformer, batch)),
            "x0_error": float(error.mean().detach()),
            "reference_error": float((reference - clean).square().mean()),
        }
        return weighted.mean(), numbers

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(count, generator=generator).clamp(min=1e-3)
        shift = self.options.flow_shift
        sigmas = shift * uniform / (1 + (shift - 1) * uniform)
        pure = torch.rand(count, generator=generator) < self.options.pure_noise_share
        return torch.where(pure, torch.ones(count), sigmas)

    def _without_some_references(self, batch: WindowBatch, sigma: Tensor, generator: torch.Generator) -> WindowBatch:
        chosen = torch.rand(len(sigma), generator=generator).to(sigma.device) < 0.5
        dropped = chosen & (sigma < self.options.keep_reference_above)
        if not dropped.any():
            return batch
        reference = batch.reference.clone()
        reference[dropped] = 0
        return replace(batch, reference=reference)


def _num_tokens(transformer: StageTwoTransformer, batch: WindowBatch) -> int:
    patch: Sequence[int] = transformer.config.patch_size
    size, _, frames, height, width = batch.slots.shape
    return size * frames * (height // patch[1]) * (width // patch[2])
