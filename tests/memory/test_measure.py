"""Measured costs against numbers counted by hand, against runs of whole networks, and against real tensors."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.measured_costs import standard_runs
from swifti2v.geometry import Size
from swifti2v.memory import measure as measuring
from swifti2v.memory import table
from swifti2v.memory.costs import Clip, Decoding, Encoding, Forward, Weights
from swifti2v.memory.measure import build, completed, measure
from swifti2v.memory.networks import EXPERT, MINI_CODEC, STAGE_TWO, WAN22, WAN_CODEC, Network
from swifti2v.wan.quantized_linear import store_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKLWan, WanTransformer3DModel

GIB = 2**30
LIGHT = WAN22.with_light_decoder().light_decoder
FIVE_FRAMES = Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, 96, 5, 88, 160)


def test_stage_two_at_full_size() -> None:
    """By hand: 30 blocks of 6LD^2 + 2TD^2 + 2LDF multiply-adds, 4 L^2 D and 4 L T D for attention."""
    cost = measure(FIVE_FRAMES)
    tokens, text, width, inner = 17_600, 512, 3072, 14336
    blocks = 6 * tokens * width**2 + 2 * text * width**2 + 2 * tokens * width * inner
    assert cost.blocks * 1e12 == pytest.approx(2 * 30 * blocks, rel=1e-9)
    assert cost.attention * 1e12 == pytest.approx(30 * 4 * tokens * (tokens + text) * width, rel=1e-9)
    assert cost.work.tflop == pytest.approx(271.0, abs=0.05)
    assert 1.26 < cost.working_bytes / GIB < 1.28
    assert cost.kept_text_bytes == pytest.approx(30 * 2 * text * width * 2, rel=0.02)


def test_stage_two_with_kept_context() -> None:
    """Three targets beside two frames whose keys and values are kept."""
    later = measure(Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, 96, 3, 88, 160, 2))
    assert later.work.tflop == pytest.approx(162.8, abs=0.05)
    assert later.kept_context_bytes == 2 * 3520 * 3072 * 2 * 2 * 30


@pytest.mark.parametrize(
    ("question", "tflop", "gib"),
    [
        (Forward(WAN22.stage_one, "bfloat16", "bfloat16", "none", 512, 36, 21, 44, 80), 731.6, 1.97),
        (Forward(WAN22.text_encoder, "bfloat16", "bfloat16", "none", 512), 4.84, 0.094),
    ],
)
def test_stage_one_at_full_size(question: Forward, tflop: float, gib: float) -> None:
    cost = measure(question)
    assert cost.work.tflop == pytest.approx(tflop, abs=0.05)
    assert cost.working_bytes / GIB == pytest.approx(gib, rel=0.01)


def test_codecs_at_full_size() -> None:
    """From the table, for it takes long; a test below measures a smaller size again."""
    codec = WAN22.stage_two_codec
    encode, decode = (table.measured(kind(codec, "bfloat16", 2560, 1408)) for kind in (Encoding, Decoding))
    assert encode.work(21).tflop == pytest.approx(1034, abs=0.5)
    assert (decode.first, decode.work(21).tflop) == pytest.approx((82.9, 5403), abs=0.5)
    assert [each / GIB for each in (encode.peak_bytes, encode.cache_bytes)] == pytest.approx([6.55, 3.95], abs=0.01)
    assert [each / GIB for each in (decode.peak_bytes, decode.cache_bytes)] == pytest.approx([17.09, 11.98], abs=0.01)
    assert LIGHT is not None
    light = measure(Decoding(LIGHT, "bfloat16", 2560, 1408))
    assert light.work(21).tflop == pytest.approx(25.8, abs=0.05)
    assert light.peak_bytes / GIB == pytest.approx(0.53, abs=0.01)
    assert table.measured(Clip(WAN22.stage_one_codec, "float32", 640, 352, 81)).tflop == pytest.approx(247.1, abs=0.05)


@pytest.mark.parametrize(
    ("network", "num_parameters"),
    [
        (WAN22.stage_one, 14_288_901_184),
        (WAN22.stage_two, 4_999_787_712 + 48 * 4 * 3072 + 4 * 3072),  # TI2V-5B, 48 further channels, kinds of frames
        (WAN22.text_encoder, 5_680_910_336),
        (WAN22.stage_one_codec, 126_892_531),
    ],
)
def test_parameters(network: Network, num_parameters: int) -> None:
    assert measure(Weights(network, "float32")).num_parameters == num_parameters


@pytest.mark.parametrize(("storage", "quantization"), [("bfloat16", "none"), ("nf4", "none"), ("bfloat16", "int8")])
def test_a_network_costs_what_one_and_two_of_its_blocks_say(storage: Any, quantization: Any) -> None:
    """Extrapolated to five blocks, and measured with five."""
    config = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 192, "num_layers": 5, "text_dim": 32}
    config |= {"in_channels": 96, "out_channels": 48, "reference_channels": 48}
    network = Network.of(STAGE_TWO, config)
    question = Forward(network, "bfloat16", storage, quantization, 16, 96, 3, 8, 8)
    cost, whole = measure(question), measuring._forward_of(question, 5)
    assert cost.work.tflop == pytest.approx(whole["matmul"] + whole["attention"], rel=1e-9)
    assert cost.working_bytes == pytest.approx(whole["working"], rel=0.01)
    assert cost.kept_text_bytes == whole["text"]
    weights = measure(Weights(network, "bfloat16", storage, quantization))
    built = build(network, "bfloat16")
    measuring.store(built, storage, quantization, dtype="bfloat16")
    assert weights.num_bytes == sum(tensor.nbytes for tensor in chain(built.parameters(), built.buffers()))
    assert weights.num_bytes == weights.outside_bytes + 5 * weights.block_bytes


@pytest.mark.parametrize("storage", ["float32", "float8", "nf4"])
def test_weights_are_those_of_real_tensors(tiny_wan_dit: Callable[..., WanTransformer3DModel], storage: Any) -> None:
    network = tiny_wan_dit(36, 16, num_layers=3)
    cost = measure(Weights(Network.of(EXPERT, dict(network.config)), "float32", storage))
    store_weights(network, storage, compute_dtype=torch.float32)
    assert cost.num_bytes == sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers()))


def test_a_codec_that_cannot_run_on_the_meta_device_runs_on_the_cpu() -> None:
    """By hand: 192 numbers of a block times 192 coefficients, and four frames into four bands."""
    codec = Network.of(MINI_CODEC, {"band_channels": (80, 43, 37, 32)})
    cost = measure(Decoding(codec, "float32", 48, 32))
    blocks = 6 * 4
    assert round(cost.first * 1e12) == 2 * blocks * 192 * 192
    assert round(cost.later * 1e12) == 2 * blocks * (192 * 192 + 4 * 4 * 192)


def test_feature_caches_are_those_of_diffusers(tiny_vae22: AutoencoderKLWan) -> None:
    held: list[torch.Tensor] = []
    clear = tiny_vae22.clear_cache

    def look_then_clear() -> None:
        held[:] = [entry for entry in getattr(tiny_vae22, "_feat_map", []) if isinstance(entry, torch.Tensor)] or held
        clear()

    tiny_vae22.clear_cache = look_then_clear
    with torch.no_grad():
        tiny_vae22.decode(torch.randn(1, 48, 3, 2, 4))
    cost = measure(Decoding(Network.of(WAN_CODEC, dict(tiny_vae22.config)), "float32", 64, 32))
    latents = 3 * 48 * 2 * 4 * 4
    assert cost.cache_bytes == pytest.approx(sum(entry.nbytes for entry in held), abs=latents)


def test_ways_to_write_a_configuration_are_one(tiny_vae22: AutoencoderKLWan) -> None:
    whole = dict(WAN22.stage_two.config) | {"num_attention_heads": 24, "text_dim": 4096, "_diffusers_version": "0"}
    assert completed(Network.of(STAGE_TWO, whole)) == completed(WAN22.stage_two)
    assert completed(Network.of(STAGE_TWO, whole | {"ffn_dim": 8})) != completed(WAN22.stage_two)


# ---- the table ----


def test_entries_of_the_shipped_table_are_what_is_measured_now() -> None:
    """Some of them, the quick ones; all, after a change that makes this fail: `python -m benchmarks.measured_costs`."""
    again = [
        FIVE_FRAMES,
        Forward(WAN22.stage_one, "bfloat16", "nf4", "none", 512, 36, 21, 22, 40),
        Weights(WAN22.stage_two, "bfloat16", "float8"),
        Weights(WAN22.stage_one, "bfloat16", "bfloat16", "int8"),
        Encoding(WAN22.stage_two_codec, "bfloat16", 320, 224),
        Decoding(WAN22.stage_two_codec, "bfloat16", 320, 224),
    ]
    for question in again:
        digest = table.shipped_table()["networks"][question.network.digest]
        assert question.answer(**table.shipped_table()["costs"][question.key(digest)]) == measure(question)


def test_standard_sizes_are_shipped() -> None:
    sizes = {str(settings.size) for _, settings in standard_runs()}
    assert {"2560x1408", "1920x1056", "1280x704"} <= sizes
    assert Size(2560, 1408) == next(standard_runs())[1].size


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "folder" / "costs.json"
    monkeypatch.setattr(table, "user_table_path", lambda: path)
    question = Weights(Network.of(MINI_CODEC, {"band_channels": (8, 4, 2, 1)}), "float32")
    table.user_table.cache_clear()
    first = table.measured(question)
    assert path.is_file()
    for cached in (table.user_table, table._measured):
        cached.cache_clear()
    monkeypatch.setattr(measuring, "measure", lambda _: pytest.fail("measured again"))
    assert table.measured(question) == first
    path.write_text("{", encoding="utf-8")  # cut off: measured again
    for cached in (table.user_table, table._measured):
        cached.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(table, "user_table_path", lambda: path)
    assert table.measured(question) == first
    table.user_table.cache_clear()
