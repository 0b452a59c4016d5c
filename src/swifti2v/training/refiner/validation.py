"""Whole clips that were held back, refined from their cached references as inference does it, segment by segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swifti2v.errors import ConfigurationError
from swifti2v.models.condition import predict_targets
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import Window, sample_segments
from swifti2v.segments import plan_segments
from swifti2v.training.refiner.segment_flow import LATENTS, PROMPT, REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from swifti2v.data.latent_cache import LatentCache
    from swifti2v.models.transformer import StageTwoTransformer


@dataclass(frozen=True)
class ValidationOfRefiner:
    """How Stage II is judged while it is trained.

    Args:
        num_samples: clips held back from training; 0: none, and no validation.
        num_steps: of the sampler.
        flow_shift: of its schedule.
        segment_size, neighbors_before: of the plan.
    """

    num_samples: int = 0
    num_steps: int = 10
    flow_shift: float = 5.0
    segment_size: int = 3
    neighbors_before: int = 1


class HeldOut:
    """A cache without the samples that validation keeps: the last of each bucket in turn, `num_samples` in all.

    Raises:
        ConfigurationError: nothing would be left to train on.
    """

    def __init__(self, cache: LatentCache, num_samples: int) -> None:
        left = {name: list(indices) for name, indices in cache.buckets.items()}
        taken: list[int] = []
        while len(taken) < num_samples:
            name = max(left, key=lambda bucket: len(left[bucket]))
            if sum(map(len, left.values())) <= 1:
                msg = f"the cache has {len(cache)} samples; hold back fewer than {num_samples} for validation"
                raise ConfigurationError(msg)
            taken.append(left[name].pop())
        self.indices: tuple[int, ...] = tuple(sorted(taken))
        self._buckets = {name: tuple(indices) for name, indices in left.items() if indices}

    @property
    def buckets(self) -> Mapping[str, tuple[int, ...]]:
        """Samples to train on, by bucket."""
        return self._buckets


class RefinerValidation:
    """Refines the clips that were held back; call it with a step for its numbers.

    Args:
        transformer: as it is trained; called with the averaged weights in place.
        samples: the whole cache.
        indices: of the clips.
        options: see `ValidationOfRefiner`.
    """

    def __init__(
        self, transformer: nn.Module, *, samples: LatentCache, indices: Sequence[int], options: ValidationOfRefiner
    ) -> None:
        self.options = options
        self._transformer: StageTwoTransformer = transformer  # type: ignore[assignment]
        self._samples = samples
        self._indices = indices

    def __call__(self, _step: int) -> dict[str, float]:
        """Return the mean squared errors of refined and unrefined latents and what is gained, in decibels."""
        if not self._indices:
            return {}
        refined, unrefined = 0.0, 0.0
        for index in self._indices:
            tensors = self._samples[index].tensors
            truth = tensors[LATENTS].float()[None, :, 1:]
            reference = tensors[f"{REFERENCE}0"].float()[None]
            made = self.refine(tensors[LATENTS].float()[None, :, :1], reference, tensors[PROMPT].float()[None])
            refined += float((made - truth).square().mean()) / len(self._indices)
            unrefined += float((reference[:, :, 1:] - truth).square().mean()) / len(self._indices)
        gained = 10 * torch.log10(torch.tensor(unrefined / max(refined, 1e-12)))
        return {"refined_error": refined, "reference_error": unrefined, "gained_decibels": float(gained)}

    def refine(self, anchor: Tensor, reference: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the refined latents [1,C,T-1,h,w] of a clip, on the CPU.

        Args:
            anchor: [1,C,1,h,w].
            reference: z_ref [1,C,T,h,w]; its frame 0 is not used.
            prompt_embeds: [1,L,D].
        """
        device = next(self._transformer.parameters()).device
        prompt = prompt_embeds.to(device)

        def frames() -> Iterator[Tensor]:
            yield anchor.to(device)
            for frame in torch.split(reference[:, :, 1:], 1, dim=2):
                yield frame.to(device)

        def denoise(window: Window, targets: Tensor, sigma: float) -> Tensor:
            return predict_targets(
                self._transformer,
                segment=window.segment,
                slots=window.reference,
                reference=window.reference,
                targets=targets,
                sigma=sigma,
                prompt_embeds=prompt,
            )

        options = self.options
        plan = plan_segments(
            reference.shape[2], segment_size=options.segment_size, neighbors_before=options.neighbors_before
        )
        sigmas = shifted_sigmas(options.num_steps, shift=options.flow_shift)
        # Frozen weights may be of another type than the trained ones, as in the loop.
        is_mixed = any(parameter.dtype == torch.bfloat16 for parameter in self._transformer.parameters())
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            made = sample_segments(frames(), plan, denoise=denoise, sigmas=sigmas, seed=0)
            return torch.cat([targets.cpu() for _, targets in made], dim=2)
