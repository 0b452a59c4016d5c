"""Two oracles: the account of the full-size system, and PyTorch's counter over diffusers' own modules."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.memory.budget import (
    WAN22,
    PhaseCost,
    RunPlan,
    plan_run,
    segments_cost,
    weight_bytes,
)
from swifti2v.memory.checkpoint_dimensions import codec_from_config, read_pipeline_dimensions
from swifti2v.memory.codec_cost import (
    WAN21_VAE,
    WAN22_VAE,
    WanCodecDimensions,
)
from swifti2v.memory.run_settings import RunSettings
from swifti2v.memory.transform_cost import BlockTransformDimensions, MotionCodecDimensions
from swifti2v.memory.transformer_cost import (
    STAGE_TWO_5B,
    UMT5_XXL,
    WAN22_I2V_A14B_EXPERT,
    WAN22_TI2V_5B,
    ForwardCost,
    TextEncoderDimensions,
    TransformerDimensions,
)
from swifti2v.segments import plan_segments
from swifti2v.wan.context_attention import KVCache
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

TWO_K = Size(2560, 1408)
LOW = Size(640, 352)
GIB = 2**30
WITHIN = 0.01


def close(expected: float) -> object:
    return pytest.approx(expected, rel=WITHIN)


# ---- the account of the full-size system (numbers counted on meta tensors from diffusers 0.42.1) ----


@pytest.mark.parametrize(
    ("transformer", "num_tokens", "linear", "self_attention", "cross_attention"),
    [
        (WAN22_I2V_A14B_EXPERT, 18_480, 444.1, 279.8, 7.8),
        (STAGE_TWO_5B, 4 * 3520, 122.9, 73.1, 2.7),
        (STAGE_TWO_5B, 5 * 3520, 153.5, 114.2, 3.3),
        (STAGE_TWO_5B, 6 * 3520, 184.1, 164.4, 4.0),
    ],
)
def test_forward_pass(
    transformer: TransformerDimensions, num_tokens: int, linear: float, self_attention: float, cross_attention: float
) -> None:
    cost = transformer.forward_cost(num_tokens)
    assert cost.linear_tflop == pytest.approx(linear, abs=0.06)
    assert cost.self_attention_tflop == pytest.approx(self_attention, abs=0.06)
    assert cost.cross_attention_tflop == pytest.approx(cross_attention, abs=0.06)
    assert cost.tflop == close(linear + self_attention + cross_attention)


@pytest.mark.parametrize(
    ("before", "after", "linear", "attention"), [(1, 0, 1013, 739), (1, 1, 1197, 1035)], ids=["before", "both"]
)
def test_one_step_over_all_segments(before: int, after: int, linear: float, attention: float) -> None:
    segments = plan_segments(21, neighbors_before=before, neighbors_after=after)
    cost = segments_cost(STAGE_TWO_5B, segments, tokens_per_frame=3520)
    assert cost.linear_tflop == close(linear)
    assert cost.self_attention_tflop + cost.cross_attention_tflop == close(attention)


def test_context_that_is_kept_is_counted_as_pytorch_counts_it() -> None:
    """Five frames of 2560x1408, two of them context; the second pass runs the other three (meta device)."""
    with torch.device("meta"):
        network = StageTwoTransformer(in_channels=96, reference_channels=48).to(torch.bfloat16).eval()
        latents = torch.empty(1, 96, 5, 88, 160, dtype=torch.bfloat16)
        text, timestep = torch.empty(1, 512, 4096, dtype=torch.bfloat16), torch.empty(1, 5)
    kinds, memory = torch.tensor([1, 2, 0, 0, 0]), KVCache(30)
    counted = []
    for frames in (slice(0, 5), slice(2, 5)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(latents[:, :, frames], timestep[:, frames], text, frame_kinds=kinds[frames], kv_cache=memory)
        counted.append(counter.get_total_flops() / 1e12)
    first = STAGE_TWO_5B.forward_cost(5 * 3520, num_timesteps=5)
    later = STAGE_TWO_5B.forward_cost(3 * 3520, num_timesteps=3, kept_tokens=2 * 3520)
    assert [first.tflop, later.tflop] == pytest.approx(counted, rel=1e-3)
    kept = sum(each.nbytes for block in memory.blocks for each in (block.key, block.value) if each is not None)
    assert STAGE_TWO_5B.kept_bytes(2 * 3520) == kept


def test_a_run_with_kept_context_takes_less_work_and_more_memory() -> None:
    steps = {"size": TWO_K, "num_inference_steps": 4}
    exact, kept = (plan_run(WAN22, RunSettings(**steps, keep_context=keep)).phases[3] for keep in (False, True))
    assert exact.num_forwards == kept.num_forwards == 28
    assert 0.70 < kept.tflop / exact.tflop < 0.72  # 0.70 for a whole window; the first has no neighbour
    assert kept.activation_bytes - exact.activation_bytes == 2 * 3520 * 3072 * 2 * 2 * 30
    one = (plan_run(WAN22, RunSettings(TWO_K, num_inference_steps=1, keep_context=keep)) for keep in (False, True))
    assert len({run.tflop for run in one}) == 1


def test_text_encoder() -> None:
    assert UMT5_XXL.forward_cost(512).tflop == close(4.84)


@pytest.mark.parametrize(
    ("codec", "size", "encode_first", "encode", "decode_first", "decode"),
    [(WAN22_VAE, TWO_K, 17.3, 1034, 82.9, 5403), (WAN21_VAE, LOW, 1.52, 92.1, None, 155.0)],
    ids=["wan2.2", "wan2.1"],
)
def test_codecs(
    codec: WanCodecDimensions,
    size: Size,
    encode_first: float,
    encode: float,
    decode_first: float | None,
    decode: float,
) -> None:
    assert codec.encode_tflop(size, 1) == close(encode_first)
    assert codec.encode_tflop(size, 81) == close(encode)
    assert codec.decode_tflop(size, 81) == close(decode)
    if decode_first is not None:
        assert codec.decode_tflop(size, 1) == close(decode_first)


def test_weights() -> None:
    assert weight_bytes(WAN22_I2V_A14B_EXPERT.num_parameters, "bfloat16") / GIB == close(26.67)
    assert weight_bytes(WAN22_I2V_A14B_EXPERT.num_parameters, "float8") / GIB == close(13.3)
    assert weight_bytes(WAN22_I2V_A14B_EXPERT.num_parameters, "nf4") / GIB == close(7.1)
    assert weight_bytes(STAGE_TWO_5B.num_parameters, "bfloat16") / GIB == close(9.33)
    assert weight_bytes(UMT5_XXL.num_parameters, "bfloat16") / GIB == close(10.58)
    assert weight_bytes(WAN22_VAE.num_parameters, "float32") / GIB == close(2.63)
    assert weight_bytes(WAN22.num_parameters, "bfloat16") / GIB == close(74.8)
    assert WAN22_TI2V_5B.num_parameters == 4_999_787_712


def test_activations() -> None:
    for frames, eager, fused in ((4, 1.10, 0.65), (5, 1.38, 0.81), (6, 1.65, 0.97), (21, 5.8, 3.4)):
        assert STAGE_TWO_5B.activation_bytes(frames * 3520) / GIB == pytest.approx(eager, rel=0.02)
        assert STAGE_TWO_5B.activation_bytes(frames * 3520, fused=True) / GIB == pytest.approx(fused, rel=0.02)
    assert WAN22_I2V_A14B_EXPERT.activation_bytes(18_480) / GIB == pytest.approx(1.98, rel=0.02)
    assert WAN22_I2V_A14B_EXPERT.activation_bytes(18_480, fused=True) / GIB == pytest.approx(1.04, rel=0.02)


def test_codec_memory() -> None:
    assert WAN22_VAE.encode_cache_bytes(TWO_K) / GIB == close(3.95)
    assert WAN22_VAE.decode_cache_bytes(TWO_K) / GIB == close(11.98)
    # The counted peaks, 15.9 and 37.8, hold the clip twice (1.63 each): patchified input, concatenated output.
    assert WAN22_VAE.encode_bytes(TWO_K) / GIB == pytest.approx(15.9 - 2 * 1.63, rel=0.02)
    assert WAN22_VAE.decode_bytes(TWO_K) / GIB == pytest.approx(37.8 - 2 * 1.63, rel=0.02)


def test_the_whole_run() -> None:
    run = plan_run(WAN22, RunSettings(TWO_K))
    by_name = {phase.name: phase for phase in run.phases}
    assert [phase.name for phase in run.phases] == [
        "text encoding",
        "stage one",
        "reference encode",
        "stage two",
        "decode",
    ]
    assert by_name["stage one"].num_tokens == 18_480
    assert by_name["stage two"].num_tokens == 17_600
    assert by_name["stage two"].num_forwards == 7 * 4
    assert by_name["stage two"].tflop == close(7009)
    # Wan's codec runs lean: counted on the meta device, 17.1 and 6.55 GiB (diffusers: 36 and 12.8).
    assert by_name["decode"].activation_bytes / GIB == pytest.approx(17.1, rel=0.02)
    assert by_name["reference encode"].activation_bytes / GIB == pytest.approx(6.55, rel=0.02)
    # The account's fixed part is 9,525 with a single-frame encode in Stage I; diffusers encodes the whole window.
    assert run.tflop == close(9525 + (92.1 - 1.5) + 7009)
    assert run.peak_bytes == max(phase.peak_bytes for phase in run.phases)
    assert run.resident_bytes > run.weight_bytes > run.peak_bytes


def test_stage_two_guidance_doubles_only_what_it_guides() -> None:
    plain = plan_run(WAN22, RunSettings(TWO_K))
    guided = plan_run(WAN22, RunSettings(TWO_K, guidance_scale=5.0))
    ratios = [after.tflop / before.tflop for before, after in zip(plain.phases, guided.phases, strict=True)]
    assert ratios == pytest.approx([2, 1, 1, 2, 1])


# ---- properties ----


@given(frames=st.integers(0, 200).map(lambda count: 4 * count + 1))
@settings(deadline=None, max_examples=30)
def test_stage_two_memory_does_not_grow_and_work_grows_linearly(frames: int) -> None:
    def stage_two(num_frames: int) -> PhaseCost:
        return plan_run(WAN22, RunSettings(Size(640, 352), num_frames=num_frames)).phases[3]

    here, longer = stage_two(frames), stage_two(frames + 12)
    assert here.activation_bytes <= stage_two(81).activation_bytes
    if frames > 25:
        inner = STAGE_TWO_5B.forward_cost(5 * 220, num_timesteps=5).tflop * 4
        assert longer.tflop - here.tflop == pytest.approx(inner)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": Size(100, 100)}, "multiple of 32"),
        ({"num_frames": 80}, "4k\\+1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"stage_one_steps": -1}, "stage_one_steps is -1"),
        ({"segment_size": 0}, "segment_size is 0"),
    ],
)
def test_impossible_runs_are_refused(changes: dict[str, object], words: str) -> None:
    run = dataclasses.replace(RunSettings(TWO_K), **changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=words):
        plan_run(WAN22, run)


def test_sums() -> None:
    phases = (PhaseCost("a", 1, 1, 2.0, 10, 5), PhaseCost("b", 1, 1, 3.0, 1, 20))
    run = RunPlan(phases, weight_bytes=11)
    assert (run.tflop, run.peak_bytes, run.resident_bytes) == (5.0, 21, 31)
    assert (ForwardCost(1, 2, 3) + ForwardCost(1, 1, 1)).times(2).tflop == 18


# ---- the modules themselves ----


def counted_tflop(run: Callable[[], object]) -> float:
    """What PyTorch counts. It does not see fused attention on the CPU, so compare the linear part only."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def test_transformer_against_the_counter(tiny_wan_dit: Callable[..., WanTransformer3DModel]) -> None:
    model = tiny_wan_dit(96, 48, num_layers=3, ffn_dim=40)
    dimensions = TransformerDimensions.from_config(model.config)
    frames, height, width, text = 2, 6, 8, 5
    counted = counted_tflop(
        lambda: model(torch.randn(1, 96, frames, height, width), torch.tensor([3.0]), torch.randn(1, text, 32))
    )
    tokens = dimensions.num_tokens(frames, height, width)
    assert tokens == frames * 12
    assert dimensions.forward_cost(tokens, text_tokens=text).linear_tflop == pytest.approx(counted, rel=1e-9)
    assert dimensions.num_parameters == sum(weight.numel() for weight in model.parameters())


def test_text_encoder_against_the_counter(tiny_text_encoder: UMT5EncoderModel) -> None:
    dimensions = TextEncoderDimensions.from_config(tiny_text_encoder.config.to_dict())
    cost = dimensions.forward_cost(9)
    counted = counted_tflop(lambda: tiny_text_encoder(torch.ones(1, 9, dtype=torch.long)))
    # Whether the scores are seen depends on the attention back end that transformers picks.
    assert counted == pytest.approx(cost.linear_tflop) or counted == pytest.approx(cost.tflop)
    assert dimensions.num_parameters == sum(weight.numel() for weight in tiny_text_encoder.parameters())


@pytest.mark.parametrize("name", ["tiny_vae21", "tiny_vae22"])
def test_codec_against_the_counter(name: str, request: pytest.FixtureRequest) -> None:
    vae: AutoencoderKLWan = request.getfixturevalue(name)
    dimensions = WanCodecDimensions.from_config(vae.config)
    size, frames = Size(64, 32), 9
    shape = CodecGeometry(dimensions.spatial_factor, dimensions.temporal_factor, 1).latent_shape(size, frames)
    latents = torch.randn(1, dimensions.num_channels, *shape)
    pixels = torch.randn(1, 3, frames, size.height, size.width)
    width = dimensions.base_dim * dimensions.dim_mult[-1]
    attention = 4 * (shape.height * shape.width) ** 2 * width * shape.num_latent_frames / 1e12
    encoded = counted_tflop(lambda: vae.encode(pixels))
    decoded = counted_tflop(lambda: vae.decode(latents))
    assert dimensions.encode_tflop(size, frames) - attention == pytest.approx(encoded, rel=1e-9)
    assert dimensions.decode_tflop(size, frames) - attention == pytest.approx(decoded, rel=1e-9)
    assert dimensions.num_parameters == sum(weight.numel() for weight in vae.parameters())


@pytest.mark.parametrize("name", ["tiny_vae21", "tiny_vae22"])
def test_feature_caches_against_the_module(name: str, request: pytest.FixtureRequest) -> None:
    vae: AutoencoderKLWan = request.getfixturevalue(name)
    dimensions = WanCodecDimensions.from_config(vae.config)
    size = Size(64, 32)
    shape = CodecGeometry(dimensions.spatial_factor, dimensions.temporal_factor, 1).latent_shape(size, 9)
    held: list[torch.Tensor] = []
    clear = vae.clear_cache

    def look_then_clear() -> None:
        held[:] = [entry for entry in getattr(vae, "_feat_map", []) if isinstance(entry, torch.Tensor)] or held
        clear()

    vae.clear_cache = look_then_clear
    with torch.no_grad():
        vae.decode(torch.randn(1, dimensions.num_channels, *shape))
    assert dimensions.decode_cache_bytes(size, element_bytes=4) == sum(entry.numel() * 4 for entry in held)


def test_block_transform_against_the_module() -> None:
    from swifti2v.mini.transform_codec import BlockTransformCodec

    codec = BlockTransformCodec(band_channels=(7, 5, 3, 0))
    dimensions = codec_from_config({"_class_name": "BlockTransformCodec", **codec.config})
    assert isinstance(dimensions, BlockTransformDimensions)
    assert (dimensions.num_channels, dimensions.spatial_factor, dimensions.temporal_factor) == (15, 8, 4)
    assert dimensions.num_parameters == sum(buffer.numel() for buffer in codec.buffers())
    chunks = [torch.randn(1, 3, count, 16, 24) for count in (1, 4, 4)]
    counted = counted_tflop(lambda: list(codec.encode_stream(chunks)))
    assert dimensions.encode_tflop(Size(24, 16), 9) == pytest.approx(counted)


def test_motion_codec_against_the_module() -> None:
    from swifti2v.mini.motion_codec import MotionCodec

    codec = MotionCodec(image_channels=15, residual_band_channels=(7, 5, 3, 0))
    dimensions = codec_from_config({"_class_name": "MotionCodec", **codec.config})
    assert isinstance(dimensions, MotionCodecDimensions)
    assert dimensions.num_channels == codec.config["z_dim"]
    assert dimensions.num_parameters == sum(buffer.numel() for buffer in codec.buffers())
    pixels, motion = torch.zeros(1, 3, 9, 16, 24), torch.zeros(1, 2, 8, 16, 24)
    latents = torch.zeros(1, dimensions.num_channels, 3, 2, 3)
    encoded = counted_tflop(lambda: codec.encode_with_motion(pixels, motion))
    assert dimensions.encode_tflop(Size(24, 16), 9) == pytest.approx(encoded)
    assert dimensions.decode_tflop(Size(24, 16), 9) == pytest.approx(counted_tflop(lambda: codec.decode(latents)))


# ---- checkpoint folders ----


def write_checkpoint(
    folder: Path,
    tiny_wan_dit: Callable[..., WanTransformer3DModel],
    vaes: tuple[AutoencoderKLWan, AutoencoderKLWan],
    text_encoder: UMT5EncoderModel,
) -> None:
    tiny_wan_dit(36, 16).save_config(folder / "stage_one/transformer")
    tiny_wan_dit(96, 48).save_config(folder / "stage_two/transformer")
    vaes[0].save_config(folder / "stage_one/vae")
    vaes[1].save_config(folder / "stage_two/vae")
    text_encoder.config.save_pretrained(folder / "stage_one/text_encoder")


def test_a_saved_checkpoint_is_read_and_planned(
    tmp_path: Path,
    tiny_wan_dit: Callable[..., WanTransformer3DModel],
    tiny_vae21: AutoencoderKLWan,
    tiny_vae22: AutoencoderKLWan,
    tiny_text_encoder: UMT5EncoderModel,
) -> None:
    write_checkpoint(tmp_path, tiny_wan_dit, (tiny_vae21, tiny_vae22), tiny_text_encoder)
    parts = (tmp_path / "stage_one", tmp_path / "stage_two/transformer", tmp_path / "stage_two/vae")
    dimensions = read_pipeline_dimensions(*parts)
    assert dimensions.num_experts == 1
    assert dimensions.stage_two.in_channels == 96
    assert dimensions.stage_two_codec.spatial_factor == 16
    modules = (tiny_wan_dit(36, 16), tiny_wan_dit(96, 48), tiny_vae21, tiny_vae22, tiny_text_encoder)
    assert dimensions.num_parameters == sum(weight.numel() for module in modules for weight in module.parameters())
    assert plan_run(dimensions, RunSettings(Size(256, 128), num_frames=9)).tflop > 0

    tiny_wan_dit(36, 16).save_config(tmp_path / "stage_one/transformer_2")
    assert read_pipeline_dimensions(*parts).num_experts == 2

    (tmp_path / "stage_one/vae/config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"stage_one/vae/config\.json"):
        read_pipeline_dimensions(*parts)


def test_configs_that_lack_something_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'num_layers'"):
        TransformerDimensions.from_config({"num_attention_heads": 2})
    with pytest.raises(ConfigurationError, match=r"'AutoencoderDC'.*AutoencoderKLWan"):
        codec_from_config({"_class_name": "AutoencoderDC"})
