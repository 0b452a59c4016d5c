"""Stage II: the hybrid reference refined segment by segment (paper, CSG), as a stream.

Pixels of the reference go in chunk by chunk, finished latents come out segment by segment; nothing here grows with the
length of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry
from swifti2v.memory.heap import trim_heap
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import nothing_finished, sample_segments
from swifti2v.sampling.solvers import euler, renoise
from swifti2v.segments import plan_segments
from swifti2v.wan.condition import predict_targets
from swifti2v.wan.context_attention import KVCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from swifti2v.sampling.segmented import OnSegmentStep, Window
    from swifti2v.segments import Segment
    from swifti2v.settings import GenerationSettings
    from swifti2v.wan.streaming import StreamingCodec
    from swifti2v.wan.transformer import StageTwoTransformer

SOLVERS = {"euler": euler, "renoise": renoise}


@dataclass(frozen=True)
class FinishedLatents:
    """Latents that are done: those of a segment, or the anchor (`segment` None). `latents` is [1,C,n,h,w]."""

    segment: Segment | None
    latents: Tensor


class _KVCaches:
    """KV caches of the current window, one for each text; a new window starts with empty ones."""

    def __init__(self, transformer: StageTwoTransformer) -> None:
        self._num_blocks = len(transformer.blocks)
        self._window: Window | None = None
        self._caches: list[tuple[Tensor, KVCache]] = []

    def of(self, window: Window, text: Tensor) -> KVCache:
        if window is not self._window:
            self._window, self._caches = window, []
        for known, cache in self._caches:
            if known is text:
                return cache
        cache = KVCache(self._num_blocks)
        self._caches.append((text, cache))
        return cache

    def clear(self) -> None:
        self._window, self._caches = None, []


class StageTwo:
    """The refiner: a transformer and the codec of its latents.

    Args:
        transformer: with reference channels (`concat`) or without (`training-free`).
        codec: streaming codec of the same latents.
        uses_prompt: whether the network was trained with prompts; otherwise it is given an empty text.
    """

    def __init__(self, transformer: StageTwoTransformer, codec: StreamingCodec, *, uses_prompt: bool = True) -> None:
        self.transformer = transformer
        self.codec = codec
        self.uses_prompt = uses_prompt
        self.geometry = CodecGeometry(
            spatial=codec.spatial_factor, temporal=codec.temporal_factor, patch=transformer.config.patch_size[1]
        )

    def plan(self, settings: GenerationSettings) -> tuple[Segment, ...]:
        """Return the segments of a clip.

        Raises:
            InvalidInputError: a size or length does not divide, or the clip is too long for the network's positions.
        """
        shape = self.geometry.latent_shape(settings.size, settings.num_frames)
        segments = plan_segments(
            shape.num_latent_frames,
            segment_size=settings.segment_size,
            neighbors_before=settings.neighbors_before,
            neighbors_after=settings.neighbors_after,
            anchor=settings.anchor,
        )
        # Asked here, or a long clip would fail after Stage I, deep in its refinement.
        limit = self.transformer.config.rope_max_seq_len
        last = max((segment.positions(settings.positions)[-1] for segment in segments), default=0)
        if settings.denoises_segments and last >= limit:
            longest = self.geometry.pixel_frames(limit)
            msg = (
                f"this Stage II has {limit} positions in time, and {settings.num_frames} frames with positions "
                f"{settings.positions} need {last + 1}; use at most {longest} frames, or positions compact"
            )
            raise InvalidInputError(msg)
        return segments

    def refine(
        self,
        reference_chunks: Iterable[Tensor],
        settings: GenerationSettings,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        finished: Callable[[Segment], Tensor | None] = nothing_finished,
        on_step: OnSegmentStep | None = None,
    ) -> Iterator[FinishedLatents]:
        """Yield the anchor, then each segment as it finishes.

        Args:
            reference_chunks: pixels of the hybrid reference, [1,3,f,H,W] in [-1,1], f = 1, 4, 4, ...
            settings: schedule, guidance, segments and seed.
            prompt_embeds: [1,L,D]; needed where `uses_prompt`.
            negative_prompt_embeds: the same, needed for guidance.
            finished: stored targets of a resumed run.
            on_step: see `sample_segments`.
        """
        self.check_refiner(settings)
        text = self._text(prompt_embeds)
        negative = self._text(negative_prompt_embeds) if settings.guidance_scale > 1 else None
        latents = self.codec.encode_stream(reference_chunks)
        anchor = next(latents)
        yield FinishedLatents(None, anchor)

        caches = _KVCaches(self.transformer) if self.keeps_context(settings) else None

        def predict(window: Window, targets: Tensor, sigma: float, embeds: Tensor) -> Tensor:
            return predict_targets(
                self.transformer,
                segment=window.segment,
                reference=window.reference,
                targets=targets,
                sigma=sigma,
                prompt_embeds=embeds,
                position_mode=settings.positions,
                kv_cache=caches.of(window, embeds) if caches else None,
            )

        def denoise(window: Window, targets: Tensor, sigma: float) -> Tensor:
            if targets.device.type == "cpu":
                trim_heap()
            clean = predict(window, targets, sigma, text)
            if negative is None:
                return clean
            without = predict(window, targets, sigma, negative)
            return without + settings.guidance_scale * (clean - without)

        sampled = sample_segments(
            chain([anchor], latents),
            self.plan(settings),
            denoise=denoise,
            sigmas=shifted_sigmas(settings.num_inference_steps, shift=settings.flow_shift, start=settings.sigma_start),
            seed=settings.seed,
            solver=SOLVERS[settings.solver],
            finished=finished,
            on_step=on_step,
        )
        with self.transformer.text_kept():
            for segment, targets in sampled:
                if caches is not None:
                    caches.clear()  # gigabytes, and whoever reads this may decode on the same device
                yield FinishedLatents(segment, targets)
                del targets

    def keeps_context(self, settings: GenerationSettings) -> bool:
        """Return whether the context is run once a segment: because it is asked for, or as nothing is lost by it.

        Raises:
            InvalidInputError: it is asked for beside a cache of diffusers.
        """
        if self.transformer.is_cache_enabled:  # it compares the tokens of one step with those of the next
            if settings.keep_context:
                msg = "keep_context does not work beside a cache of diffusers; disable_cache() first, or turn it off"
                raise InvalidInputError(msg)
            return False
        is_exact = self.transformer.config.context_attention == "frozen"
        return settings.num_inference_steps > 1 and (settings.keep_context or is_exact)

    def _text(self, embeds: Tensor | None) -> Tensor:
        # Where and in what the network works, which is not where it waits: a kept text is known by its tensor, and the
        # network would be given a copy of another one at every call.
        device, dtype = get_module_execution_device(self.transformer), self.transformer.dtype
        if not self.uses_prompt:
            return torch.zeros(1, 1, self.transformer.config.text_dim, device=device, dtype=dtype)
        if embeds is None:
            msg = "this Stage II was trained with prompts; pass prompt_embeds (and negative ones for guidance)"
            raise InvalidInputError(msg)
        return embeds.to(device, dtype)

    def check_refiner(self, settings: GenerationSettings) -> None:
        """Raise `InvalidInputError` if the network was not made for the refiner of `settings`."""
        reference_channels = self.transformer.config.in_channels - self.transformer.config.out_channels
        if settings.refiner == "concat" and reference_channels == 0:
            msg = (
                "this checkpoint's Stage II was not trained with the reference as channels; "
                "use the refiner training-free, or a checkpoint trained by swifti2v"
            )
            raise InvalidInputError(msg)
        if settings.refiner == "training-free" and reference_channels:
            msg = "this checkpoint's Stage II needs the reference as channels; use the refiner concat"
            raise InvalidInputError(msg)
