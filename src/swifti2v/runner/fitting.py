"""A run within limits of memory: planned for its size, placed, and planned anew when the device was full after all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from swifti2v.errors import MemoryBudgetError
from swifti2v.memory.amounts import format_bytes
from swifti2v.memory.device_errors import is_out_of_memory
from swifti2v.memory.devices import device_rates
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.networks import LIGHT_DECODER, PATH, STAGE_TWO, Network, PipelineNetworks
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.memory.plan import MemoryPlan, plan_memory, tighter_budget
from swifti2v.stage_one import StageOne
from swifti2v.stage_two import StageTwo
from swifti2v.wan.quantized_linear import quantization_of, storages_of, store_weights, stored_narrow
from swifti2v.wan.streaming import CodecSettings, WanStreamingCodec
from swifti2v.wan.taehv import LightDecoder
from swifti2v.wan.tiling import Tiling

if TYPE_CHECKING:
    from collections.abc import Generator

    from diffusers import WanImageToVideoPipeline
    from torch import Tensor

    from swifti2v.runner.ahead import Overlap
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings

LOGGER = logging.getLogger("swifti2v")
ASSUMED_RATES = device_rates("RTX 4090")
"""Which plan is fastest hardly depends on the card."""


def frames_within_limits(
    parts: Parts, settings: GenerationSettings, attempt: Callable[[Parts], Iterator[Tensor]]
) -> Generator[Tensor, None, None]:
    """Yield the frames of a run; where the device runs out of memory, go on with the next tighter plan.

    Args:
        parts: where they have no limits, or none of their networks is to run, the run is attempted once, as they are.
            Stage II is planned and placed only where the refiner runs it; `light` counts for nothing in a plan, as it
            comes after Stage I and needs less.
        settings: of the run.
        attempt: the run from its start with placed parts, in the same pieces every time; it finds finished segments
            in its work directory. Pieces that were handed out are made again by a later attempt, and dropped.

    Raises:
        MemoryBudgetError: no plan fits, or none that is tighter than the one that failed.
    """
    if not settings.denoises_segments:
        parts = replace(parts, stages=tuple(stage for stage in parts.stages if stage != "stage_two"))
    if parts.memory is None or not networks_of(parts).planned:
        yield from attempt(parts)
        return
    plan = plan_for(parts, settings, parts.memory)
    num_done = 0
    while True:
        networks = PlacedNetworks(parts.device)
        try:
            placed = place(parts, plan, networks)
            with closing(cast("Generator[Tensor, None, None]", attempt(placed))) as pieces:
                for index, frames in enumerate(pieces):
                    if index >= num_done:
                        num_done += 1
                        yield frames
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            plan = _tighter(parts, settings, plan, error)
            LOGGER.warning(
                "the device ran out of memory; going on with a plan of %s: %s",
                format_bytes(plan.peak_bytes),
                "; ".join(way.description for way in plan.ways),
            )
        finally:
            networks.release()


def plan_for(parts: Parts, settings: GenerationSettings, limits: MemoryLimits) -> MemoryPlan:
    """Return the plan of a run; raise `MemoryBudgetError` if none fits.

    Weights stay as they were loaded where such a plan fits; else they are stored in float8, or in nf4. Once they are,
    no later plan has them wider. Quantized transformers stay as they are, and only the text encoder can be stored.
    """
    transformer = parts.stage_two.transformer
    # Where there is a text encoder, it is stored whenever the transformers are, and it is never quantized.
    stored = transformer if parts.pipeline is None else parts.pipeline.text_encoder
    storages = storages_of(transformer.dtype)
    held = stored_narrow(stored) if quantization_of(stored) == "none" else None
    return plan_memory(
        networks_of(parts),
        replace(settings, keep_context=parts.stage_two.keeps_context(settings)),
        ASSUMED_RATES,
        budget_bytes=limits.device_bytes,
        host_bytes=limits.host_bytes,
        storages=storages if held is None else storages[storages.index(held) :],
    )


def networks_of(parts: Parts) -> PipelineNetworks:
    """Describe the loaded networks to a plan."""
    two = parts.stage_two
    decoder = parts.decoder.network if isinstance(parts.decoder, LightDecoder) else None
    return PipelineNetworks(
        **_stage_one_networks(parts),
        stage_two=Network.of(STAGE_TWO, dict(two.transformer.config)),
        stage_two_codec=_described(getattr(two.codec, "vae", two.codec)),
        text_tokens=parts.stage_one.max_sequence_length,
        reference_reduction=parts.motion_reduction,
        max_reference_area=parts.motion_max_area,
        light_decoder=None if decoder is None else Network.of(LIGHT_DECODER, asdict(decoder.layout)),
        quantization=next(map(quantization_of, parts.transformers), "none"),
        compute_dtype="float32" if two.transformer.dtype == torch.float32 else "bfloat16",
        stages=parts.stages,
    )


def _stage_one_networks(parts: Parts) -> dict[str, Any]:
    """Return the fields of `PipelineNetworks` that describe Stage I."""
    if not isinstance(parts.stage_one, StageOne):
        return PATH
    one = parts.stage_one.pipeline
    experts = [expert for expert in (one.transformer, one.transformer_2) if expert is not None]
    return {
        "text_encoder": _described(one.text_encoder, one.text_encoder.config.to_dict()),
        "stage_one": _described(experts[0]),
        "stage_one_codec": _described(one.vae),
        "num_experts": len(experts),
        "window_frames": parts.stage_one.window_frames,
        "overlap_frames": parts.stage_one.overlap_frames,
    }


def _described(network: Any, config: Mapping[str, Any] | None = None) -> Network:
    kind = type(network)
    package = kind.__module__.split(".")[0]
    module = package if package in {"diffusers", "transformers"} else kind.__module__
    return Network.of(f"{module}:{kind.__name__}", dict(network.config) if config is None else config)


def place(parts: Parts, plan: MemoryPlan, networks: PlacedNetworks) -> Parts:
    """Put the networks where `plan` wants them, and return the parts to run with.

    `networks` are to be released after the run, and also if this fails: then some of them have their places already.
    """
    one = parts.pipeline
    encoders = () if one is None else (one.text_encoder,)
    for network in (*encoders, *parts.transformers):
        store_weights(network, plan.storage, compute_dtype=network.dtype)
    if one is not None:
        _place_stage_one(one, plan, networks)
    return _with_stage_two_placed(parts, plan, networks) if "stage_two" in parts.stages else parts


def _place_stage_one(one: WanImageToVideoPipeline, plan: MemoryPlan, networks: PlacedNetworks) -> None:
    networks.place(one.text_encoder, plan.placement_of("text encoding"), group="text", by_leaf=True)
    for group, network in (("high", one.transformer), ("low", one.transformer_2)):
        if network is not None:
            networks.place(network, plan.placement_of("stage one"), group=group)
    # Whole clips in float32 take more than the experts at work: these leave before it.
    resident = plan.placement_of("stage one") == "resident"
    networks.place(one.vae, "resident" if resident else "loaded", group="codec of stage one")


def _with_stage_two_placed(parts: Parts, plan: MemoryPlan, networks: PlacedNetworks) -> Parts:
    two = parts.stage_two
    networks.place(two.transformer, plan.placement_of("refinement"), group="refinement")
    codec = two.codec
    if isinstance(codec, WanStreamingCodec):
        resident = plan.placement_of("refinement") == "resident"
        networks.place(codec.vae, "resident" if resident else "loaded", group="refinement")
        codec = WanStreamingCodec(codec.vae, settings=_codec_settings(plan, codec.settings))
    elif isinstance(codec, torch.nn.Module):
        codec.to(parts.device)
    decoder = parts.decoder
    beside: Overlap = "decode" if plan.overlaps_decode else "write"
    if isinstance(decoder, WanStreamingCodec):
        # On a device of its own: the same limit is taken to hold there, and here there is room beside.
        decoder = WanStreamingCodec(decoder.vae, settings=_codec_settings(plan, decoder.settings))
        beside = "decode"
    placed = StageTwo(two.transformer, codec, uses_prompt=two.uses_prompt)
    overlap = "none" if parts.overlap == "none" else beside
    return replace(parts, stage_two=placed, overlap=overlap, decoder=decoder)


def _codec_settings(plan: MemoryPlan, settings: CodecSettings) -> CodecSettings:
    way = plan.codec
    tiling = Tiling(way.tile) if way.columns * way.rows > 1 else None
    return CodecSettings(tiling, settings.chunked, frames_per_step=1, offload_features=way.offloads_features)


def _tighter(parts: Parts, settings: GenerationSettings, plan: MemoryPlan, error: BaseException) -> MemoryPlan:
    limits = replace(parts.memory or MemoryLimits(), device_bytes=tighter_budget(plan))
    try:
        return plan_for(parts, settings, limits)
    except MemoryBudgetError as refusal:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        smallest = format_bytes(plan.peak_bytes)
        msg = f"the device ran out of memory ({said}) with the smallest plan ({smallest}); {refusal}"
        raise MemoryBudgetError(msg) from error
