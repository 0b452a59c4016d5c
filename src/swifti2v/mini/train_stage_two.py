"""Stage II of `mini`: refine a segment of the hybrid reference, seeing image and finished neighbors (CSG).

Each step draws segments at random places of random clips, cut to a spatial crop: targets are noised, context is the
truth with a little noise (exposure bias), the loss is on the targets only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from swifti2v.mini.fitting import BandStatistics
from swifti2v.mini.transform_codec import BLOCK_NUMBERS, TEMPORAL, BlockTransformCodec
from swifti2v.training.engine.samples import Prefetcher
from swifti2v.training.refiner.windows import (
    ClipBatch,
    DrawnClips,
    WindowOptions,
    drawn_own_segments,
    earlier_segments,
    predicted,
    with_own_context,
)
from swifti2v.wan.transformer import StageTwoTransformer
from swifti2v.wan.transformer_configuration import ContextAttention  # noqa: TC001 - read from recipes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.mini.reference_pairs import ReferencePair


NUMBERS_OF_A_CELL = BLOCK_NUMBERS * TEMPORAL
ERROR_FLOOR = 1e-5
"""50 dB, where a sample is as good as its codec: below it the logarithm would count for ever more."""


@dataclass(frozen=True)
class StageTwoRecipe:
    """Everything that decides what Stage II of `mini` becomes, but for the data.

    Args:
        num_channels: latent channels of the block transform, of 768.
        width, num_layers, ffn_width, local_detail_width, head_width, context_attention: of the transformer.
        patch: latent cells per token side (8 pixels each).
        crops: spatial crops in latent cells (height, width), multiples of `patch`.
        pure_noise_share: share of samples at sigma 1, where a one-step sampler works.
        context_noise: largest standard deviation of the noise on finished context.
        own_context_share, own_context_segments: share of windows whose finished neighbor is the network's own output,
            and at most how many segments it made one after the other; see `SegmentFlowOptions`.
        anchor_share: share of windows that see the anchor.
    """

    num_channels: int = 192
    width: int = 256
    num_layers: int = 2
    ffn_width: int = 448
    local_detail_width: int = 256
    head_width: int = 128
    context_attention: ContextAttention = "bidirectional"
    text_width: int = 96
    patch: int = 4
    segment_size: int = 3
    batch_size: int = 6
    crops: tuple[tuple[int, int], ...] = ((32, 32), (24, 44), (44, 24))
    pure_noise_share: float = 0.7
    context_noise: float = 0.05
    own_context_share: float = 0.0
    own_context_segments: int = 1
    anchor_share: float = 1.0
    seed: int = 0


def fit_block_codec(chunks: Sequence[Tensor], *, num_channels: int) -> BlockTransformCodec:
    """Fit the codec on pixel chunks [1,3,f,H,W]; a channel's scale is the root of its deviation.

    Between no normalization (fine detail drowned in noise at once) and whitening (detail that cannot be predicted
    weighs as much as the picture).
    """
    statistics = BandStatistics()
    statistics.add(chunks)
    codec = BlockTransformCodec(statistics.best_band_channels(num_channels))
    codec.transform, deviation = statistics.fit(codec.transform.band_channels)
    codec.scale.copy_(deviation.sqrt())
    return codec


def make_stage_two_transformer(recipe: StageTwoRecipe) -> StageTwoTransformer:
    """Build Stage II's transformer at the recipe's size; its output starts at zero: the reference as it is."""
    torch.manual_seed(recipe.seed)
    transformer = StageTwoTransformer(
        patch_size=(1, recipe.patch, recipe.patch),
        num_attention_heads=recipe.width // recipe.head_width,
        attention_head_dim=recipe.head_width,
        in_channels=2 * recipe.num_channels,
        out_channels=recipe.num_channels,
        reference_channels=recipe.num_channels,
        prediction_type="residual",
        text_dim=recipe.text_width,
        freq_dim=256,
        ffn_dim=recipe.ffn_width,
        num_layers=recipe.num_layers,
        local_detail_width=recipe.local_detail_width,
        context_attention=recipe.context_attention,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class StageTwoObjective:
    """Restore the targets of random segments; the `Objective` of Stage II."""

    def __init__(
        self,
        recipe: StageTwoRecipe,
        *,
        codec: BlockTransformCodec,
        transformer: StageTwoTransformer,
        pairs: Sequence[ReferencePair],
    ) -> None:
        self.recipe = recipe
        self.module: nn.Module = transformer
        self._transformer = transformer
        self._pairs = pairs
        self._windows = WindowOptions(segment_size=recipe.segment_size, anchor_share=recipe.anchor_share)
        # The transform is orthonormal: with this weight, squared errors of latents are those of pixels.
        self._weight = codec.scale.square().view(1, -1, 1, 1, 1) * (codec.num_channels / NUMBERS_OF_A_CELL)
        self._batches = Prefetcher(self._batch)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """PSNR loss of the targets: the log of a sample's squared error, so that every clip counts for its decibels.

        The numbers are decibels in pixels: of the reference as it is, and what the network adds at sigma 1.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        drawn = self._batches.take(step)
        batch = with_own_context(
            self._transformer,
            drawn.clips,
            drawn.segment,
            earlier=drawn.earlier,
            sigmas=(1.0, 0.0),
            context_noise=self.recipe.context_noise,
            generator=generator,
        )
        truth, reference = batch.targets, batch.reference[:, :, batch.segment.target_slice]
        size = len(truth)
        sigma = torch.rand(size, generator=generator)
        sigma[torch.rand(size, generator=generator) < self.recipe.pure_noise_share] = 1.0
        noisy = torch.lerp(truth, torch.randn(truth.shape, generator=generator), sigma.view(-1, 1, 1, 1, 1))
        restored = predicted(self._transformer, batch, noisy, sigma)
        error, unrefined = (self._log_error(each, truth) for each in (restored, reference))
        pure = sigma == 1
        gained = float((unrefined - error.detach())[pure].mean()) if pure.any() else 0.0
        return error.mean(), {"reference_decibels": -float(unrefined.mean()), "gained": gained}

    def _log_error(self, latents: Tensor, truth: Tensor) -> Tensor:
        """Return the mean squared error in pixels of each sample in decibels, peak 2: [B]."""
        squared = ((latents - truth).square() * self._weight).mean(dim=(1, 2, 3, 4)) / 4
        return 10 * torch.log10(squared + ERROR_FLOOR)

    def _batch(self, step: int) -> DrawnClips:
        rng = np.random.default_rng([self.recipe.seed, step])
        chance = np.random.default_rng([self.recipe.seed, step, 1])
        own = drawn_own_segments(chance, share=self.recipe.own_context_share, most=self.recipe.own_context_segments)
        segment = self._windows.draw(rng, self._pairs[0].truth.shape[1], segments_before=own)
        crop = self.recipe.crops[int(rng.integers(len(self.recipe.crops)))]
        samples = [self._crop(crop, rng) for _ in range(self.recipe.batch_size)]
        truth, reference = (torch.stack(part) for part in zip(*samples, strict=True))
        prompts = torch.zeros(len(samples), 1, self.recipe.text_width)
        earlier = earlier_segments(segment, segment_size=self._windows.segment_size, count=own)
        return DrawnClips(ClipBatch(truth, reference, prompts), segment, earlier)

    def _crop(self, crop: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Cut one sample [C,T,h,w] out of a clip that is large enough."""
        while True:
            pair = self._pairs[int(rng.integers(len(self._pairs)))]
            height, width = pair.truth.shape[2:]
            if height >= crop[0] and width >= crop[1]:
                break
        top, left = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
        place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
        return pair.truth[place].float(), pair.reference[place].float()
