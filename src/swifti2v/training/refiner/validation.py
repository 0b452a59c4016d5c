"""Whole clips that were held back, refined from their cached references as inference does it, segment by segment."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING

import torch

from swifti2v.data.latent_cache import read_index
from swifti2v.errors import ConfigurationError
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import Window, sample_segments
from swifti2v.segments import plan_segments
from swifti2v.training.refiner.windows import LATENTS, PROMPT, REFERENCE
from swifti2v.wan.condition import predict_targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from swifti2v.data.latent_cache import LatentCache
    from swifti2v.training.engine.distributed import Processes
    from swifti2v.wan.transformer import StageTwoTransformer


@dataclass(frozen=True)
class ValidationOfRefiner:
    """How Stage II is judged while it is trained, and how the checkpoint says that it is to be run.

    Args:
        num_samples: videos held back from training, of each of which one clip is refined; 0: none, and no validation.
        num_steps: of the sampler; a distilled Stage II has its own.
        flow_shift: of its schedule; that of the training.
        segment_size, neighbors_before: of the plan.
    """

    num_samples: int = 0
    num_steps: int = 10
    flow_shift: float = 5.0
    segment_size: int = 3
    neighbors_before: int = 1

    def check_shift(self, flow_shift: float) -> None:
        """Raise `ConfigurationError` unless the schedule has the time shift of the training."""
        if self.flow_shift != flow_shift:
            msg = f"flow_shift is {flow_shift} in training and {self.flow_shift} in validation; set both to one value"
            raise ConfigurationError(msg)


class HeldOut:
    """A cache without the videos that validation keeps.

    Clips of one video are alike, so that all of them stay away from training. Which videos are kept is decided by
    hashes of their names: the order of names often means something.

    Attributes:
        indices: the first clip of each video that is kept.

    Raises:
        ConfigurationError: nothing would be left to train on.
    """

    def __init__(self, cache: LatentCache, num_samples: int) -> None:
        clips: dict[str, list[int]] = {}
        for index, record in enumerate(read_index(cache.folder).samples):
            clips.setdefault(_video_of(record.name), []).append(index)
        if num_samples and num_samples >= len(clips):
            msg = f"the cache has clips of {len(clips)} videos; hold back fewer than {num_samples} for validation"
            raise ConfigurationError(msg)
        kept = sorted(clips, key=_hash_of)[:num_samples]
        self.indices: tuple[int, ...] = tuple(sorted(clips[video][0] for video in kept))
        held = {index for video in kept for index in clips[video]}
        left = {bucket: tuple(i for i in indices if i not in held) for bucket, indices in cache.buckets.items()}
        self._buckets = {bucket: indices for bucket, indices in left.items() if indices}

    @property
    def buckets(self) -> Mapping[str, tuple[int, ...]]:
        """Samples to train on, by bucket."""
        return self._buckets


class RefinerValidation:
    """Refines the clips that were held back; call it with a step for its numbers.

    Args:
        transformer: as it is trained; called with the averaged weights in place, in the precision of training.
        samples: the whole cache.
        indices: of the clips.
        options: see `ValidationOfRefiner`.
        processes: that divide the clips.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        samples: LatentCache,
        indices: Sequence[int],
        options: ValidationOfRefiner,
        processes: Processes,
    ) -> None:
        self.options = options
        self._transformer: StageTwoTransformer = transformer  # type: ignore[assignment]
        self._samples = samples
        self._processes = processes
        self._rounds = _rounds(samples, indices, processes.batch_count)

    def __call__(self, _step: int) -> dict[str, float]:
        """Return the mean squared errors of refined and unrefined latents and what is gained, in decibels.

        They are those of all clips, and the same in every process.
        """
        if not self._rounds:
            return {}
        place, own = self._processes.batch_rank, []
        for clips in self._rounds:
            # Each forward of a sharded network is a meeting of all processes: one without a clip repeats the last.
            errors = self._errors_of(clips[min(place, len(clips) - 1)])
            own += [errors] if place < len(clips) else []
        everyone = self._processes.gather(own)[:: self._processes.context]
        all_errors = [errors for errors_of_one in everyone for errors in errors_of_one]
        refined, unrefined = (sum(errors) / len(all_errors) for errors in zip(*all_errors, strict=True))
        gained = 10 * log10(max(unrefined, 1e-12) / max(refined, 1e-12))
        return {"refined_error": refined, "reference_error": unrefined, "gained_decibels": gained}

    def _errors_of(self, index: int) -> tuple[float, float]:
        """Return the mean squared errors of a clip, refined and unrefined."""
        tensors = self._samples[index].tensors
        truth = tensors[LATENTS].float()[None, :, 1:]
        reference = tensors[f"{REFERENCE}0"].float()[None]
        made = self.refine(tensors[LATENTS].float()[None, :, :1], reference, tensors[PROMPT].float()[None])
        return float((made - truth).square().mean()), float((reference[:, :, 1:] - truth).square().mean())

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
        made = sample_segments(frames(), plan, denoise=denoise, sigmas=sigmas, seed=0)
        return torch.cat([targets.cpu() for _, targets in made], dim=2)


def _rounds(samples: LatentCache, indices: Sequence[int], num_places: int) -> list[tuple[int, ...]]:
    """Return the clips that are refined at a time, of one length: all of them take equally many forwards."""
    if not indices:
        return []
    records = read_index(samples.folder).samples
    by_length: dict[int, list[int]] = {}
    for index in indices:
        by_length.setdefault(records[index].shapes[LATENTS][1], []).append(index)
    return [
        tuple(clips[start : start + num_places])
        for clips in by_length.values()
        for start in range(0, len(clips), num_places)
    ]


def _video_of(name: str) -> str:
    """Return the video that a clip is cut from (`data.clips`: ``clip.mp4@120``)."""
    return name.rpartition("@")[0] or name


def _hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
