"""The ways in which each phase of a run can be had, with their bytes and predicted seconds. Arithmetic only.

Phases follow each other and give the device back, except the last: encoding, Stage II and decoding take turns for every
segment, so that their weights and their features are there together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from swifti2v.geometry import CodecGeometry, Size
from swifti2v.memory.budget import (
    guided_passes,
    plan_run,
    refinement_cost,
    stored_bytes,
    unpacking_bytes,
    weight_bytes,
)
from swifti2v.memory.codec_cost import WanCodecDimensions
from swifti2v.memory.lean_cost import lean_decode_bytes, lean_encode_bytes
from swifti2v.segments import plan_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.memory.budget import PhaseCost, PipelineDimensions, Products, WeightDtype
    from swifti2v.memory.devices import DeviceRates
    from swifti2v.memory.run_settings import RunSettings
    from swifti2v.memory.transformer_cost import ForwardCost, TransformerDimensions

OVERLAP_PIXELS = 128
GRIDS = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4), (6, 6))
"""Columns and rows of codec tiles that are tried."""
BLOCKS_IN_FLIGHT = 3
"""Blocks of a streamed network on the device: one at work, the next, and one on its way (`placement.Pace`)."""

Placement = Literal["resident", "loaded", "streamed"]
"""Where weights stand: all of the run's on the device, those of a phase, or two blocks at a time."""


@dataclass(frozen=True)
class CodecWay:
    """How Stage II's codec runs.

    Args:
        columns, rows: of tiles.
        tile: its size in pixels; that of the frame where there is one tile.
        frames_per_step: frames at full resolution that pass together.
        parks_features: caches lie in host memory while another tile or the transformer is at work.
    """

    columns: int
    rows: int
    tile: Size
    frames_per_step: int
    parks_features: bool

    def __str__(self) -> str:
        tiles = "untiled" if self.columns * self.rows == 1 else f"{self.columns}x{self.rows} tiles"
        return f"codec {tiles}, {self.frames_per_step} frames a step{', features parked' * self.parks_features}"


@dataclass(frozen=True)
class Way:
    """One way to run one phase.

    Args:
        phase: `text encoding`, `stage one`, `refinement` (encode, Stage II, decode).
        placement: see there; `loaded`: each network once.
        weight_bytes: on the device.
        working_bytes: beyond the weights, at the peak.
        transfer_bytes: between host and device.
        seconds: predicted.
        parked_bytes: of features in host memory.
        overlap_bytes: beyond `working_bytes`, where decoding runs beside the denoising of the next segment.
    """

    phase: str
    placement: Placement
    weight_bytes: int
    working_bytes: int
    transfer_bytes: int
    seconds: float
    codec: CodecWay | None = None
    parked_bytes: int = 0
    overlap_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Device memory of the phase."""
        return self.weight_bytes + self.working_bytes

    @property
    def description(self) -> str:
        """What this way does, in words."""
        words = {"resident": "weights stay", "loaded": "weights come and go", "streamed": "weights stream by block"}
        return words[self.placement] + (f", {self.codec}" if self.codec is not None else "")


class _CodecNeeds(NamedTuple):
    """A way to run the codec, and what it takes.

    Args:
        way: the way.
        working_bytes: on the device, at the peak of coding.
        idle_bytes: on the device while the transformer is at work.
        parked_bytes: in host memory.
        transfer_bytes: between host and device.
        seconds: predicted, of all coding in the run.
    """

    way: CodecWay
    working_bytes: int
    idle_bytes: int
    parked_bytes: int
    transfer_bytes: int
    seconds: float


def phase_ways(
    dimensions: PipelineDimensions, settings: RunSettings, rates: DeviceRates, dtype: WeightDtype
) -> tuple[tuple[Way, ...], ...]:
    """Return the ways of each phase of the stages held while the networks of the others are off the device."""
    phases = {phase.name: phase for phase in plan_run(dimensions, settings, weight_dtype=dtype).phases}
    narrow = dimensions.transformer_dtype(dtype)
    found = []
    if "stage_one" in dimensions.stages:
        found.append(tuple(_text_ways(dimensions, phases["text encoding"], rates, dtype)))
        found.append(tuple(_stage_one_ways(dimensions, settings, phases["stage one"], rates, narrow)))
    if "stage_two" in dimensions.stages:
        found.append(tuple(_refinement_ways(dimensions, settings, phases, rates, narrow)))
    return tuple(found)


def resident_ways(
    dimensions: PipelineDimensions, settings: RunSettings, rates: DeviceRates, dtype: WeightDtype
) -> tuple[Way, ...]:
    """Return the way of each phase with all weights on the device throughout, and nothing cut or parked."""
    weights = dimensions.stored_bytes(dtype)
    loaded = [
        min((way for way in ways if way.placement == "loaded"), key=lambda way: way.seconds)
        for ways in phase_ways(dimensions, settings, replace(rates, host_bytes_per_second=float("inf")), dtype)
    ]
    return tuple(replace(way, placement="resident", weight_bytes=weights, transfer_bytes=0) for way in loaded)


def _text_ways(
    dimensions: PipelineDimensions, phase: PhaseCost, rates: DeviceRates, dtype: WeightDtype
) -> Iterator[Way]:
    encoder = dimensions.text_encoder
    weights = stored_bytes(encoder, dtype)
    seconds = phase.tflop / rates.matmul_tflop_per_second + weights / rates.host_bytes_per_second
    table = weight_bytes(encoder.vocab_size * encoder.d_model, "bfloat16" if dtype != "float32" else dtype)
    block = (weights - table) // encoder.num_layers
    working = phase.activation_bytes + unpacking_bytes(encoder, dtype)
    flight = table + 2 * block  # by layer, of which there are no more than in two blocks
    placements: tuple[tuple[Placement, int], ...] = (("loaded", weights), ("streamed", flight))
    for placement, held in placements:
        yield Way(
            phase.name,
            placement,
            weight_bytes=held,
            working_bytes=working,
            transfer_bytes=weights,
            seconds=seconds,
        )


def _stage_one_ways(
    dimensions: PipelineDimensions,
    settings: RunSettings,
    phase: PhaseCost,
    rates: DeviceRates,
    dtype: WeightDtype,
) -> Iterator[Way]:
    expert, codec = dimensions.stage_one, dimensions.stage_one_codec
    weights = stored_bytes(expert, dtype)
    cost, ends = (
        network.forward_cost(phase.num_tokens, text_tokens=dimensions.text_tokens)
        for network in (expert, _without_blocks(expert))
    )
    forward = _seconds(cost, ends, rates, products=dimensions.products)
    windows = plan_windows(
        settings.num_frames,
        window_frames=dimensions.window_frames,
        overlap_frames=dimensions.overlap_frames,
        temporal=codec.temporal_factor,
    )
    size = dimensions.reference_size(settings.size)
    tflop = sum(codec.encode_tflop(size, len(w)) + codec.decode_tflop(size, len(w)) for w in windows)
    coding = tflop / rates.convolution_tflop_per_second
    visits = len(windows) * dimensions.num_experts
    loads = visits * weights
    working = phase.activation_bytes + unpacking_bytes(expert, dtype)
    yield Way(
        phase.name,
        "loaded",
        weight_bytes=weights,
        working_bytes=working,
        transfer_bytes=loads,
        seconds=coding + phase.num_forwards * forward + loads / rates.host_bytes_per_second,
    )
    passing = max(forward, weights / rates.host_bytes_per_second)
    yield Way(
        phase.name,
        "streamed",
        weight_bytes=_flight_bytes(expert, dtype),
        working_bytes=working,
        transfer_bytes=phase.num_forwards * weights,
        seconds=coding + phase.num_forwards * passing,
    )


def _refinement_ways(
    dimensions: PipelineDimensions,
    settings: RunSettings,
    phases: dict[str, PhaseCost],
    rates: DeviceRates,
    dtype: WeightDtype,
) -> Iterator[Way]:
    transformer = dimensions.stage_two
    weights = stored_bytes(transformer, dtype)
    codec_weights = weight_bytes(dimensions.decoding_parameters, "bfloat16")
    compute, num_forwards = stage_two_seconds(dimensions, settings, rates)
    transfer_seconds = weights / rates.host_bytes_per_second
    text = _text_bytes(dimensions, settings)
    activation = phases["stage two"].activation_bytes + text + unpacking_bytes(transformer, dtype)
    placements: tuple[tuple[Placement, int, int, float], ...] = (
        ("loaded", weights, weights, compute + transfer_seconds),
        (
            "streamed",
            _flight_bytes(transformer, dtype),
            num_forwards * weights,
            max(compute, num_forwards * transfer_seconds),
        ),
    )
    for coding in _codec_ways(dimensions, settings, rates):
        for placement, held, moved, passing in placements:
            yield Way(
                "refinement",
                placement,
                weight_bytes=held + codec_weights,
                working_bytes=max(coding.working_bytes + text, coding.idle_bytes + activation),
                transfer_bytes=moved + coding.transfer_bytes,
                seconds=passing + coding.seconds,
                codec=coding.way,
                parked_bytes=coding.parked_bytes,
                # Beside a decode at its peak the other thread encodes or denoises; the caches are counted once.
                overlap_bytes=max(coding.working_bytes - coding.idle_bytes, activation),
            )


def _text_bytes(dimensions: PipelineDimensions, settings: RunSettings) -> int:
    """Bytes of the keys and values of the text, which every block keeps for the clip (`wan/text_attention.py`)."""
    return guided_passes(settings.guidance_scale) * dimensions.stage_two.kept_bytes(dimensions.text_tokens)


def stage_two_seconds(dimensions: PipelineDimensions, settings: RunSettings, rates: DeviceRates) -> tuple[float, int]:
    """Return the predicted seconds of Stage II's forward passes, and how many they are."""
    cost, num_forwards = refinement_cost(dimensions, settings)
    ends, _ = refinement_cost(replace(dimensions, stage_two=_without_blocks(dimensions.stage_two)), settings)
    return _seconds(cost, ends, rates, products=dimensions.products), num_forwards


def _without_blocks(transformer: TransformerDimensions) -> TransformerDimensions:
    """Return what is never multiplied in eight bits: the embeddings and the last projection."""
    return replace(transformer, num_layers=0)


def _seconds(cost: ForwardCost, ends: ForwardCost, rates: DeviceRates, *, products: Products) -> float:
    """Return the predicted seconds of `cost`, of which `ends` is outside the blocks; kernels fused, rounding too."""
    blocks = (cost.linear_tflop - ends.linear_tflop) / rates.products_tflop_per_second(products)
    attention = (cost.self_attention_tflop + cost.cross_attention_tflop) / rates.attention_tflop_per_second
    return ends.linear_tflop / rates.matmul_tflop_per_second + blocks + attention


def _codec_ways(dimensions: PipelineDimensions, settings: RunSettings, rates: DeviceRates) -> Iterator[_CodecNeeds]:
    codec, light, size = dimensions.stage_two_codec, dimensions.light_decoder, settings.size
    encode_tflop = codec.encode_tflop(size, settings.num_frames)
    decode_tflop = (light or codec).decode_tflop(size, settings.num_frames)
    num_latent_frames = CodecGeometry(temporal=codec.temporal_factor).latent_frames(settings.num_frames)
    picture = 3 * 4 * size.width * size.height * codec.temporal_factor
    if not isinstance(codec, WanCodecDimensions):
        whole = max(codec.encode_bytes(size), codec.decode_bytes(size))
        seconds = (encode_tflop + decode_tflop) / rates.convolution_tflop_per_second
        yield _CodecNeeds(CodecWay(1, 1, size, 1, False), whole, 0, 0, 0, seconds)
        return
    # A light decoder is never cut into tiles, nor parked.
    remembered = 0 if light is None else light.remembered_bytes(size)
    for columns, rows in GRIDS:
        tile = tile_size(size, columns, rows, multiple=codec.spatial_factor)
        share = tile.width * tile.height * columns * rows / (size.width * size.height)
        tflop = encode_tflop * share + decode_tflop * (share if light is None else 1)
        seconds = tflop / rates.convolution_tflop_per_second
        encode_cache = codec.encode_cache_bytes(tile)
        decode_cache = codec.decode_cache_bytes(tile) if light is None else 0
        caches = columns * rows * (encode_cache + decode_cache)
        visited_bytes = (
            2
            * columns
            * rows
            * (num_latent_frames * encode_cache + -(-num_latent_frames // settings.segment_size) * decode_cache)
        )
        for frames in (1, 2, 4):
            encoding = lean_encode_bytes(codec, tile, frames_per_step=frames) - encode_cache
            if light is None:
                decoding = lean_decode_bytes(codec, tile, frames_per_step=frames) - decode_cache
            else:
                decoding = light.decode_bytes(size) - remembered
            way = CodecWay(columns, rows, tile, frames, False)
            idle = remembered + caches
            yield _CodecNeeds(way, idle + max(encoding, decoding) + picture, idle, 0, 0, seconds)
            # A parked codec decodes a segment at a time, and holds its pictures until they are blended.
            working = max(encoding + encode_cache, decoding + decode_cache)
            parked_peak = remembered + working + settings.segment_size * picture
            parking = visited_bytes / rates.host_bytes_per_second
            parked = replace(way, parks_features=True)
            yield _CodecNeeds(parked, parked_peak, remembered, caches, visited_bytes, seconds + parking)


def tile_size(size: Size, columns: int, rows: int, *, multiple: int, overlap: int = OVERLAP_PIXELS) -> Size:
    """Return the smallest tile, in multiples of `multiple`, with which so many columns and rows cover a frame."""

    def side(length: int, count: int) -> int:
        if count == 1:
            return length
        return -(-(length + (count - 1) * overlap) // (count * multiple)) * multiple

    return Size(side(size.width, columns), side(size.height, rows))


def _flight_bytes(transformer: TransformerDimensions, dtype: WeightDtype) -> int:
    """Bytes of a streamed transformer on the device: blocks, and what is not in a block, which comes as a whole."""
    ends = stored_bytes(_without_blocks(transformer), dtype)
    return BLOCKS_IN_FLIGHT * ((stored_bytes(transformer, dtype) - ends) // transformer.num_layers) + ends
