"""What a run costs before anything is loaded: tokens, TFLOP and bytes of each phase. Arithmetic only.

FLOPs are exact for the networks they describe (`transformer_cost.py`, `codec_cost.py`). Bytes leave out what a driver
and a convolution library hold on top: 0.5-0.8 GiB of CUDA context, workspaces of up to one layer's input and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size, motion_size
from swifti2v.memory.codec_cost import WAN21_VAE, WAN22_VAE, WanCodecDimensions
from swifti2v.memory.lean_cost import lean_decode_bytes, lean_encode_bytes
from swifti2v.memory.transformer_cost import (
    NO_COST,
    STAGE_TWO_5B,
    UMT5_XXL,
    WAN22_I2V_A14B_EXPERT,
    ForwardCost,
)
from swifti2v.segments import plan_segments, plan_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swifti2v.memory.codec_cost import CodecCost
    from swifti2v.memory.light_cost import LightDecoderDimensions
    from swifti2v.memory.run_settings import RunSettings
    from swifti2v.memory.transformer_cost import TextEncoderDimensions, TransformerDimensions
    from swifti2v.segments import Segment

WeightDtype = Literal["float32", "bfloat16", "float8", "int8", "nf4"]
BITS_PER_WEIGHT: dict[WeightDtype, float] = {"float32": 32, "bfloat16": 16, "float8": 8, "int8": 8, "nf4": 4.25}
"""Storage of one weight; nf4 with the scales of its blocks (`normal_float.py`)."""
Products = Literal["none", "float8", "int8"]
"""Arithmetic of the linear layers of the transformers' blocks (`wan/quantized_linear.py`)."""


@dataclass(frozen=True)
class PipelineDimensions:
    """The networks of both stages, as far as their cost goes.

    Args:
        stage_one: one expert of Stage I.
        num_experts: experts of Stage I that take turns; each holds its own weights.
        text_tokens: length to which prompts are padded.
        reference_factor: how much smaller the motion reference is on each side.
        max_reference_area: pixels of a frame of the motion reference at most; None: no limit.
        window_frames: longest clip that Stage I makes at once, in pixel frames.
        overlap_frames: pixel frames that a later window of Stage I shares with the one before it.
        light_decoder: decodes in the place of Stage II's codec; None: that codec does.
        products: the linear layers of the transformers' blocks hold and multiply these, however the other weights are
            stored; `none`: they are stored like them, and multiplied in bfloat16.
        stages: whose weights are held: a memory plan is made for these alone.
    """

    text_encoder: TextEncoderDimensions
    stage_one: TransformerDimensions
    stage_one_codec: CodecCost
    stage_two: TransformerDimensions
    stage_two_codec: CodecCost
    num_experts: int = 2
    text_tokens: int = 512
    reference_factor: float = 4.0
    max_reference_area: int | None = None
    window_frames: int = 81
    overlap_frames: int = 5
    light_decoder: LightDecoderDimensions | None = None
    products: Products = "none"
    stages: tuple[Literal["stage_one", "stage_two"], ...] = ("stage_one", "stage_two")

    def reference_size(self, size: Size) -> Size:
        """Return the size of the motion reference of an output of `size`."""
        multiple = self.stage_one_codec.spatial_factor * self.stage_one.patch_size[1]
        return motion_size(size, reduction=self.reference_factor, max_area=self.max_reference_area, multiple=multiple)

    def transformer_dtype(self, dtype: WeightDtype) -> WeightDtype:
        """Return how the transformers are stored where the other weights are stored as `dtype`."""
        return dtype if self.products == "none" else self.products

    @property
    def transformer_parameters(self) -> int:
        """Weights of the transformers, every expert counted."""
        return self.num_experts * self.stage_one.num_parameters + self.stage_two.num_parameters

    @property
    def num_parameters(self) -> int:
        """Weights of all networks, every expert counted."""
        codecs = self.stage_one_codec.num_parameters + self.decoding_parameters
        return self.transformer_parameters + self.text_encoder.num_parameters + codecs

    @property
    def decoding_parameters(self) -> int:
        """Weights of Stage II's codec, and of the light decoder where there is one."""
        light = 0 if self.light_decoder is None else self.light_decoder.num_parameters
        return self.stage_two_codec.num_parameters + light

    def stored_bytes(self, dtype: WeightDtype) -> int:
        """Bytes of the weights held: transformers and text encoder stored as `dtype`, the codecs as they are."""
        narrow = self.transformer_dtype(dtype)
        total = 0
        if "stage_one" in self.stages:
            total += weight_bytes(self.stage_one_codec.num_parameters, "bfloat16")
            total += self.num_experts * stored_bytes(self.stage_one, narrow) + stored_bytes(self.text_encoder, dtype)
        if "stage_two" in self.stages:
            total += weight_bytes(self.decoding_parameters, "bfloat16") + stored_bytes(self.stage_two, narrow)
        return total


WAN22 = PipelineDimensions(
    text_encoder=UMT5_XXL,
    stage_one=WAN22_I2V_A14B_EXPERT,
    stage_one_codec=WAN21_VAE,
    stage_two=STAGE_TWO_5B,
    stage_two_codec=WAN22_VAE,
)


@dataclass(frozen=True)
class PhaseCost:
    """One phase of a run.

    Args:
        num_tokens: tokens of the largest forward pass; 0 where only a codec runs.
        num_forwards: forward passes of the transformer.
        weight_bytes: the largest single network that the phase runs.
        activation_bytes: peak beyond the weights.
    """

    name: str
    num_tokens: int
    num_forwards: int
    tflop: float
    weight_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Device memory of the phase while it holds one network at a time."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class RunPlan:
    """The phases of a run in order, and the bytes of all weights together."""

    phases: tuple[PhaseCost, ...]
    weight_bytes: int

    @property
    def tflop(self) -> float:
        """The whole run."""
        return sum(phase.tflop for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        """Device memory while one network at a time is on the device."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def resident_bytes(self) -> int:
        """Device memory while all weights stay on the device."""
        return self.weight_bytes + max(phase.activation_bytes for phase in self.phases)


def weight_bytes(num_parameters: int, dtype: WeightDtype) -> int:
    """Bytes of `num_parameters` weights stored as `dtype`."""
    return round(num_parameters * BITS_PER_WEIGHT[dtype] / 8)


def stored_bytes(network: TransformerDimensions | TextEncoderDimensions, dtype: WeightDtype) -> int:
    """Bytes of a network's weights as `dtype`; of narrow ones, some of the weights stay in bfloat16."""
    if BITS_PER_WEIGHT[dtype] >= BITS_PER_WEIGHT["bfloat16"]:
        return weight_bytes(network.num_parameters, dtype)
    exact = network.exact_parameters
    if dtype == "nf4":  # nothing but the matrices of the blocks
        exact = network.num_parameters - network.num_layers * network.matrix_parameters
    return weight_bytes(network.num_parameters - exact, dtype) + weight_bytes(exact, "bfloat16")


def unpacking_bytes(network: TransformerDimensions | TextEncoderDimensions, dtype: WeightDtype) -> int:
    """Bytes beside the weights while the largest matrix is unpacked: in bfloat16, and an index of four bytes a pair."""
    return (2 + 4 // 2) * network.largest_matrix if dtype == "nf4" else 0


def guided_passes(guidance_scale: float) -> int:
    """Forward passes per step: classifier-free guidance above 1 needs a second one."""
    return 2 if guidance_scale > 1 else 1


def segments_cost(
    transformer: TransformerDimensions, segments: Sequence[Segment], *, tokens_per_frame: int, text_tokens: int = 512
) -> ForwardCost:
    """Cost of one step over all segments, one pass each."""
    total = NO_COST
    for segment in segments:
        frames = len(segment.window)
        total += transformer.forward_cost(frames * tokens_per_frame, text_tokens=text_tokens, num_timesteps=frames)
    return total


def refinement_cost(dimensions: PipelineDimensions, settings: RunSettings) -> tuple[ForwardCost, int]:
    """Return the cost of all passes of Stage II, and how many they are."""
    transformer, segments = dimensions.stage_two, _segments(dimensions, settings)
    tokens = _stage_two_geometry(dimensions).tokens_per_frame(settings.size)
    text_tokens, steps = dimensions.text_tokens, settings.num_inference_steps
    whole = segments_cost(transformer, segments, tokens_per_frame=tokens, text_tokens=text_tokens)
    later = whole
    if settings.keep_context:
        later = NO_COST
        for segment in segments:
            targets = len(segment.targets)
            later += transformer.forward_cost(
                targets * tokens,
                text_tokens=text_tokens,
                num_timesteps=targets,
                kept_tokens=(len(segment.window) - targets) * tokens,
            )
    guided = guided_passes(settings.guidance_scale)
    return (whole + later.times(steps - 1)).times(guided), steps * guided * len(segments)


def plan_run(
    dimensions: PipelineDimensions, settings: RunSettings, *, weight_dtype: WeightDtype = "bfloat16"
) -> RunPlan:
    """Count a run phase by phase.

    Args:
        dimensions: the networks.
        settings: size, length, steps and segments.
        weight_dtype: how the weights are stored, but for transformers with products of their own; activations are
            counted as bf16.

    Raises:
        InvalidInputError: a size, a length or a number of the plan cannot be used.
    """
    _check_counts(settings)
    _stage_two_geometry(dimensions).check_size(settings.size)
    narrow = dimensions.transformer_dtype(weight_dtype)
    phases = (
        _text_phase(dimensions, settings, weight_dtype),
        _stage_one_phase(dimensions, settings, narrow),
        _encode_phase(dimensions, settings, weight_dtype),
        _stage_two_phase(dimensions, settings, narrow),
        _decode_phase(dimensions, settings, weight_dtype),
    )
    others = dimensions.num_parameters - dimensions.transformer_parameters
    stored = weight_bytes(others, weight_dtype) + weight_bytes(dimensions.transformer_parameters, narrow)
    return RunPlan(phases, stored)


def _check_counts(settings: RunSettings) -> None:
    for name in ("stage_one_steps", "num_inference_steps"):
        value = getattr(settings, name)
        if value < 1:
            msg = f"{name} is {value}; it must be at least 1"
            raise InvalidInputError(msg)


def _stage_two_geometry(dimensions: PipelineDimensions) -> CodecGeometry:
    codec = dimensions.stage_two_codec
    return CodecGeometry(codec.spatial_factor, codec.temporal_factor, dimensions.stage_two.patch_size[1])


def _text_phase(dimensions: PipelineDimensions, settings: RunSettings, dtype: WeightDtype) -> PhaseCost:
    encoder, tokens = dimensions.text_encoder, dimensions.text_tokens
    prompts = max(guided_passes(settings.guidance_scale), guided_passes(settings.stage_one_guidance_scale))
    return PhaseCost(
        name="text encoding",
        num_tokens=tokens,
        num_forwards=prompts,
        tflop=encoder.forward_cost(tokens).times(prompts).tflop,
        weight_bytes=weight_bytes(encoder.num_parameters, dtype),
        activation_bytes=encoder.activation_bytes(tokens),
    )


def _stage_one_phase(dimensions: PipelineDimensions, settings: RunSettings, dtype: WeightDtype) -> PhaseCost:
    expert, codec = dimensions.stage_one, dimensions.stage_one_codec
    size = dimensions.reference_size(settings.size)
    geometry = CodecGeometry(codec.spatial_factor, codec.temporal_factor, expert.patch_size[1])
    windows = plan_windows(
        settings.num_frames,
        window_frames=dimensions.window_frames,
        overlap_frames=dimensions.overlap_frames,
        temporal=codec.temporal_factor,
    )
    passes = settings.stage_one_steps * guided_passes(settings.stage_one_guidance_scale)
    tflop = 0.0
    for frames in map(len, windows):
        tokens = expert.num_tokens(*geometry.latent_shape(size, frames))
        tflop += expert.forward_cost(tokens, text_tokens=dimensions.text_tokens).times(passes).tflop
        # diffusers encodes the image followed by empty frames, the whole window long.
        tflop += codec.encode_tflop(size, frames) + codec.decode_tflop(size, frames)
    largest = expert.num_tokens(*geometry.latent_shape(size, max(map(len, windows))))
    return PhaseCost(
        name="stage one",
        num_tokens=largest,
        num_forwards=passes * len(windows),
        tflop=tflop,
        weight_bytes=weight_bytes(max(expert.num_parameters, codec.num_parameters), dtype),
        activation_bytes=max(expert.activation_bytes(largest), codec.encode_bytes(size), codec.decode_bytes(size)),
    )


def _stage_two_phase(dimensions: PipelineDimensions, settings: RunSettings, dtype: WeightDtype) -> PhaseCost:
    transformer, segments = dimensions.stage_two, _segments(dimensions, settings)
    tokens_per_frame = _stage_two_geometry(dimensions).tokens_per_frame(settings.size)
    cost, num_forwards = refinement_cost(dimensions, settings)
    largest = tokens_per_frame * max((len(segment.window) for segment in segments), default=0)
    context = tokens_per_frame * max((len(segment.window) - len(segment.targets) for segment in segments), default=0)
    kept = guided_passes(settings.guidance_scale) * transformer.kept_bytes(context) if settings.keep_context else 0
    return PhaseCost(
        name="stage two",
        num_tokens=largest,
        num_forwards=num_forwards,
        tflop=cost.tflop,
        weight_bytes=weight_bytes(transformer.num_parameters, dtype),
        activation_bytes=transformer.activation_bytes(largest) + kept,
    )


def _segments(dimensions: PipelineDimensions, settings: RunSettings) -> tuple[Segment, ...]:
    return plan_segments(
        _stage_two_geometry(dimensions).latent_frames(settings.num_frames),
        segment_size=settings.segment_size,
        neighbors_before=settings.neighbors_before,
        neighbors_after=settings.neighbors_after,
    )


def _encode_phase(dimensions: PipelineDimensions, settings: RunSettings, dtype: WeightDtype) -> PhaseCost:
    codec = dimensions.stage_two_codec
    return PhaseCost(
        name="reference encode",
        num_tokens=0,
        num_forwards=0,
        tflop=codec.encode_tflop(settings.size, settings.num_frames),
        weight_bytes=weight_bytes(codec.num_parameters, dtype),
        activation_bytes=_coding_bytes(codec, settings.size, lean_encode_bytes, codec.encode_bytes),
    )


def _decode_phase(dimensions: PipelineDimensions, settings: RunSettings, dtype: WeightDtype) -> PhaseCost:
    codec, light = dimensions.stage_two_codec, dimensions.light_decoder
    if light is None:
        working = _coding_bytes(codec, settings.size, lean_decode_bytes, codec.decode_bytes)
    else:
        working = light.decode_bytes(settings.size)
    return PhaseCost(
        name="decode",
        num_tokens=0,
        num_forwards=0,
        tflop=(light or codec).decode_tflop(settings.size, settings.num_frames),
        weight_bytes=weight_bytes((light or codec).num_parameters, dtype),
        activation_bytes=working,
    )


def _coding_bytes(
    codec: CodecCost,
    size: Size,
    lean: Callable[[WanCodecDimensions, Size], int],
    otherwise: Callable[[Size], int],
) -> int:
    """Bytes of a stream through Stage II's codec, untiled: Wan's runs lean (`wan/lean_vae.py`)."""
    return lean(codec, size) if isinstance(codec, WanCodecDimensions) else otherwise(size)
