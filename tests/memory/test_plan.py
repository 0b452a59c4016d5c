"""Properties of memory plans: they fit, more memory is never slower, length changes nothing, refusals say what fits."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import full_size_networks
from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory.amounts import GIB
from swifti2v.memory.budget import WAN22, plan_run, stored_bytes, unpacking_bytes, weight_bytes
from swifti2v.memory.codec_cost import WAN22_VAE
from swifti2v.memory.devices import DEVICES, device_rates
from swifti2v.memory.lean_cost import lean_decode_bytes, lean_encode_bytes
from swifti2v.memory.live_bytes import accounted
from swifti2v.memory.plan import (
    CONTEXT_BYTES,
    STORED_DTYPES,
    MemoryPlan,
    plan_memory,
    tighter_budget,
)
from swifti2v.memory.run_settings import RunSettings
from swifti2v.memory.ways import GRIDS, phase_ways, stage_two_seconds, tile_size
from swifti2v.wan.quantized_linear import store_weights, use_quantized_matmul
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from swifti2v.memory.budget import PipelineDimensions
    from swifti2v.memory.transformer_cost import TransformerDimensions

TWO_K = Size(2560, 1408)


def planned(gib: float | None, *, host_gib: float | None = None, gpu: str = "rtx4090", frames: int = 81) -> MemoryPlan:
    return plan_memory(
        WAN22,
        RunSettings(TWO_K, num_frames=frames),
        device_rates(gpu),
        budget_bytes=None if gib is None else int(gib * GIB),
        host_bytes=None if host_gib is None else int(host_gib * GIB),
    )


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
def test_every_named_budget_has_a_plan_that_fits(gib: int) -> None:
    plan = planned(gib)
    assert plan.peak_bytes <= gib * GIB
    assert [way.phase for way in plan.ways] == ["text encoding", "stage one", "refinement"]
    assert plan.weight_dtype == "bfloat16"
    assert plan.seconds < 1.5 * planned(None).seconds


@pytest.mark.parametrize("gib", [8, 24, 80, None])
def test_plans_of_single_stages_are_the_phases_of_the_whole(gib: float | None) -> None:
    """Where phases take turns, each has the way that it has in the whole; only what stays on the device differs."""
    budget = None if gib is None else int(gib * GIB)
    whole = planned(gib)
    weights = 0
    for stage, phases in (("stage_one", 2), ("stage_two", 1)):
        dimensions = replace(WAN22, stages=(stage,))
        weights += dimensions.stored_bytes("bfloat16")
        plan = plan_memory(dimensions, RunSettings(TWO_K), device_rates("rtx4090"), budget_bytes=budget)
        assert len(plan.ways) == phases
        of_whole = {way.phase: way for way in whole.ways}
        for way in plan.ways:
            assert way.seconds <= of_whole[way.phase].seconds
            assert way == of_whole[way.phase] or "resident" in {way.placement, of_whole[way.phase].placement}
        assert gib is None or plan.peak_bytes <= gib * GIB
    assert weights == WAN22.stored_bytes("bfloat16")


Outcome = MemoryPlan | MemoryBudgetError


def outcome(gib: float, *, host_gib: float | None, gpu: str) -> Outcome:
    try:
        return planned(gib, host_gib=host_gib, gpu=gpu)
    except MemoryBudgetError as refusal:
        return refusal


def rank(plan: MemoryPlan) -> tuple[int, float]:
    """Exactness of the weights first, then time: less is better."""
    return STORED_DTYPES.index(plan.weight_dtype), round(plan.seconds, 6)


HOSTS = st.one_of(st.none(), st.floats(20, 130))


@given(st.floats(4, 120), st.floats(4, 120), st.sampled_from(sorted(DEVICES)), HOSTS)
@settings(max_examples=60, deadline=None)
def test_more_device_memory_is_never_worse_and_a_refusal_names_what_fits(
    one: float, other: float, gpu: str, host_gib: float | None
) -> None:
    less, more = sorted((one, other))
    tight, wide = (outcome(gib, host_gib=host_gib, gpu=gpu) for gib in (less, more))
    for gib, found in ((less, tight), (more, wide)):
        if isinstance(found, MemoryBudgetError):
            assert_named_budgets_fit(found, gib, host_gib, gpu)
            continue
        assert found.peak_bytes <= gib * GIB
        assert host_gib is None or found.host_bytes <= host_gib * GIB
    if isinstance(tight, MemoryPlan):
        assert isinstance(wide, MemoryPlan)
        assert rank(wide) <= rank(tight)


def assert_named_budgets_fit(refusal: MemoryBudgetError, gib: float, host_gib: float | None, gpu: str) -> None:
    device = re.search(r"needs ([\d.]+) GiB at the least", str(refusal))
    host = re.search(r"([\d.]+) GiB of host memory would do", str(refusal))
    weights = re.search(r"the weights take [\d.]+ GiB .*; allow ([\d.]+) GiB$", str(refusal))
    assert device or host or weights
    if weights:  # nothing is said of the device before the host has room
        assert float(weights[1]) > (host_gib or 0)
        assert planned(120, host_gib=float(weights[1]), gpu=gpu).weight_dtype == "nf4"
    if device:
        assert float(device[1]) > gib
        assert planned(float(device[1]), host_gib=host_gib, gpu=gpu).peak_bytes <= float(device[1]) * GIB
    if host:
        assert float(host[1]) > (host_gib or 0)
        assert planned(gib, host_gib=float(host[1]), gpu=gpu).host_bytes <= float(host[1]) * GIB


@given(st.floats(5, 120), st.floats(20, 130), st.floats(20, 130))
@settings(max_examples=40, deadline=None)
def test_more_host_memory_is_never_worse(gib: float, one: float, other: float) -> None:
    less, more = sorted((one, other))
    tight, wide = (outcome(gib, host_gib=host, gpu="rtx4090") for host in (less, more))
    if isinstance(tight, MemoryPlan):
        assert isinstance(wide, MemoryPlan)
        assert rank(wide) <= rank(tight)


def test_float8_is_taken_where_bfloat16_leaves_no_room_for_parked_features() -> None:
    """The weights fit into 76 GiB in bfloat16, but on 8 GiB of the device nothing runs without parking 19 GiB."""
    assert planned(24, host_gib=76).weight_dtype == "bfloat16"
    tight = planned(8, host_gib=76)
    assert tight.weight_dtype == "float8"
    assert tight.codec.parks_features
    assert "in bfloat16 no plan fits" in tight.given_up[0]


def test_decoding_runs_beside_denoising_where_there_is_room() -> None:
    assert planned(None).overlaps_decode
    for gib in (8, 16, 24, 48):
        plan = planned(gib)
        alone = replace(plan, overlaps_decode=False)
        extra = max(way.overlap_bytes for way in plan.ways)
        assert extra > GIB
        assert plan.overlaps_decode == (alone.peak_bytes + extra <= gib * GIB) or alone.ways[-1].peak_bytes < max(
            way.peak_bytes for way in alone.ways
        )


@pytest.mark.parametrize("gib", [8, 24, 80])
def test_memory_is_flat_in_length_and_time_grows_with_it(gib: int) -> None:
    short, long = planned(gib), planned(gib, frames=641)
    assert long.peak_bytes == pytest.approx(short.peak_bytes, rel=0.02)
    assert 7 < long.seconds / short.seconds < 10


def test_unlimited_memory_keeps_every_weight_on_the_device_and_gives_nothing_up() -> None:
    plan = planned(None, gpu="h200")
    assert {way.placement for way in plan.ways} == {"resident"}
    assert all(
        way.weight_bytes == pytest.approx(weight_bytes(WAN22.num_parameters, "bfloat16"), abs=4) for way in plan.ways
    )
    assert plan.given_up == ()
    assert (plan.codec.columns, plan.codec.rows, plan.codec.parks_features) == (1, 1, False)


FLOAT8, INT8 = (replace(WAN22, products=products) for products in ("float8", "int8"))
STAGE_TWO = full_size_networks.TI2V_5B | {"in_channels": 96, "reference_channels": 48}


def test_float8_products_halve_the_time_of_the_blocks_linear_layers() -> None:
    """By hand: of Stage II's 271 TFLOP a forward, 30 blocks of 6LD^2 + 2TD^2 + 2LDF multiply-adds are in float8."""
    rates, run = device_rates("h200"), RunSettings(TWO_K, segment_size=20, neighbors_before=0, num_inference_steps=1)
    (exact, one), (float8, _), (int8, _) = (stage_two_seconds(each, run, rates) for each in (WAN22, FLOAT8, INT8))
    assert one == 1
    assert int8 == float8
    length, dim, inner, text = 21 * 3520, 3072, 14336, 512
    blocks = 2 * 30 * (6 * length * dim**2 + 2 * text * dim**2 + 2 * length * dim * inner) / 1e12
    assert exact - float8 == pytest.approx(blocks * (1 / 700 - 1 / 1400))
    assert rates.float8_tflop_per_second == 2 * rates.matmul_tflop_per_second


def test_transformers_with_float8_products_take_a_byte_a_weight_and_the_text_encoder_two() -> None:
    narrow = WAN22.stored_bytes("bfloat16") - FLOAT8.stored_bytes("bfloat16")
    transformers = 2 * WAN22.stage_one.num_parameters + WAN22.stage_two.num_parameters
    assert narrow == pytest.approx(transformers, rel=0.02)
    assert FLOAT8.stored_bytes("float8") == WAN22.stored_bytes("float8")  # there is nothing to store twice
    exact, float8 = (plan_run(each, RunSettings(TWO_K)) for each in (WAN22, FLOAT8))
    assert exact.weight_bytes - float8.weight_bytes == pytest.approx(transformers)
    assert exact.tflop == float8.tflop
    halves = {"stage one", "stage two"}
    for one, other in zip(exact.phases, float8.phases, strict=True):
        assert other.weight_bytes == pytest.approx(one.weight_bytes / (2 if one.name in halves else 1), abs=1)


@pytest.mark.parametrize("gib", [8, 24, None])
@pytest.mark.parametrize(
    ("gpu", "dimensions"),
    [("h200", FLOAT8), ("rtx4090", FLOAT8), ("h200", INT8), ("rtx4090", INT8), ("a100", INT8), ("rtx3090", INT8)],
)
def test_products_in_eight_bits_are_planned_faster_and_smaller(
    gib: int | None, gpu: str, dimensions: PipelineDimensions
) -> None:
    run, budget = RunSettings(TWO_K), None if gib is None else gib * GIB
    exact, narrow = (
        plan_memory(each, run, device_rates(gpu), budget_bytes=budget, host_bytes=None) for each in (WAN22, dimensions)
    )
    assert narrow.seconds < exact.seconds
    assert narrow.host_bytes < exact.host_bytes
    assert narrow.weight_dtype == "bfloat16"  # of the text encoder
    assert budget is None or narrow.peak_bytes <= budget


@pytest.mark.parametrize("gpu", ["a100", "rtx3090"])
def test_cards_without_float8_products_say_so(gpu: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{gpu} has no float8 products; use quantization int8 or none$"):
        plan_memory(FLOAT8, RunSettings(TWO_K), device_rates(gpu), budget_bytes=None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float8", "int8", "nf4"])
@pytest.mark.parametrize(
    ("kind", "config", "dimensions", "latents"),
    [
        (WanTransformer3DModel, full_size_networks.EXPERT, WAN22.stage_one, (21, 44, 80)),
        (StageTwoTransformer, STAGE_TWO, WAN22.stage_two, (5, 88, 160)),
    ],
    ids=["stage one", "stage two"],
)
def test_bytes_of_networks_in_eight_and_four_bits(
    kind: Any, config: dict[str, Any], dimensions: TransformerDimensions, latents: tuple[int, int, int], dtype: Any
) -> None:
    """One block on the meta device: what it stores, and that rounding what enters a layer fits into the account."""
    with full_size_networks.built_on("meta"):
        network = kind(**config | {"num_layers": 1}).eval()
        window = torch.empty(1, dimensions.in_channels, *latents)
        text = torch.empty(1, 512, 4096)
    block = replace(dimensions, num_layers=1)
    if dtype == "nf4":
        store_weights(network, dtype, compute_dtype=torch.bfloat16)
    else:
        use_quantized_matmul([network], dtype, device=network.device)
    stored = sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers()))
    assert stored == pytest.approx(stored_bytes(block, dtype), rel=0.02)
    with torch.no_grad(), accounted() as account:
        network(window, torch.empty(1, device="meta"), text)
    num_tokens = block.num_tokens(*latents)
    assert account.tflop == pytest.approx(block.forward_cost(num_tokens).tflop, rel=1e-3)
    assert account.peak_bytes <= 1.02 * (block.activation_bytes(num_tokens) + unpacking_bytes(block, dtype))


def test_weights_in_four_bits_by_hand() -> None:
    """Every matrix of the blocks at 4.25 bits, all else in bfloat16: Wan2.2 fits beside a system in 32 GB."""
    expert, refiner, text = 40 * (8 * 5120**2 + 2 * 5120 * 13824), 30 * (8 * 3072**2 + 2 * 3072 * 14336), 24 * 192937984
    packed = 2 * expert + refiner + text
    assert text == 24 * (4 * 4096 * 64 * 64 + 3 * 4096 * 10240)
    assert WAN22.stored_bytes("nf4") == packed * 17 // 32 + 2 * (WAN22.num_parameters - packed)
    plan = planned(24, host_gib=28)
    assert plan.weight_dtype == "nf4"
    assert plan.host_bytes < 24 * GIB
    assert "in bfloat16 no plan fits" in plan.given_up[0]
    # Stage I streams behind its work, so that a plan in four bits is no slower.
    assert plan.seconds < 1.02 * planned(24).seconds


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_what_streams_has_room_for_three_blocks_and_what_is_in_none(dtype: Any) -> None:
    """Embeddings stay in bfloat16, and come as a whole: beside blocks of four bits they are the larger part."""
    for way, network in ((1, WAN22.stage_one), (2, WAN22.stage_two)):
        streamed = next(
            each
            for each in phase_ways(WAN22, RunSettings(TWO_K), device_rates("rtx4090"), dtype)[way]
            if each.placement == "streamed"
        )
        ends = stored_bytes(replace(network, num_layers=0), dtype)
        block = (stored_bytes(network, dtype) - ends) // network.num_layers
        assert streamed.weight_bytes >= 3 * block + ends


def test_less_memory_says_what_it_gives_up() -> None:
    plan = planned(8)
    assert plan.codec.parks_features
    assert plan.codec.columns * plan.codec.rows > 1
    assert any("tiles" in note and "s more" in note for note in plan.given_up)
    assert planned(24, host_gib=60).weight_dtype == "float8"
    assert planned(24, host_gib=60).given_up[0].startswith("weights are stored in float8")


def test_a_budget_that_cannot_be_met_names_one_that_can() -> None:
    with pytest.raises(MemoryBudgetError, match=r"no plan fits into 2\.0 GiB") as caught:
        planned(2)
    needed = float(re.search(r"needs ([\d.]+) GiB", str(caught.value))[1])  # type: ignore[index]
    assert planned(needed).peak_bytes <= needed * GIB
    with pytest.raises(MemoryBudgetError):
        planned(needed - 0.1)
    with pytest.raises(MemoryBudgetError, match=r"host memory in nf4, and 8\.0 GiB are allowed; allow") as caught:
        planned(24, host_gib=8)
    enough = float(re.search(r"allow ([\d.]+) GiB$", str(caught.value))[1])  # type: ignore[index]
    assert planned(24, host_gib=enough + 15).weight_dtype == "nf4"
    assert planned(24, host_gib=enough + 20).weight_dtype == "float8"
    with pytest.raises(MemoryBudgetError, match="allow"):
        planned(24, host_gib=enough - 0.1)


def test_the_budget_after_an_overflow_leads_to_a_smaller_plan() -> None:
    plan = planned(24)
    sizes = [plan.peak_bytes]
    for _ in range(5):
        plan = planned(tighter_budget(plan) / GIB)
        sizes.append(plan.peak_bytes)
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_tiles_cover_the_frame_with_their_overlap(columns: int, rows: int) -> None:
    tile = tile_size(TWO_K, columns, rows, multiple=16)
    for length, side, count in ((TWO_K.width, tile.width, columns), (TWO_K.height, tile.height, rows)):
        assert side % 16 == 0
        assert count * side - (count - 1) * 128 >= length
        assert count == 1 or count * (side - 16) - (count - 1) * 128 < length


# Counted from live tensors of the network on the meta device (tests/wan/test_lean_vae.py holds the network to them).
@pytest.mark.parametrize(
    ("size", "decode_gib", "encode_gib"), [(TWO_K, 17.09, 6.45), (Size(1344, 768), 4.98, 1.90)], ids=str
)
def test_lean_codec_bytes(size: Size, decode_gib: float, encode_gib: float) -> None:
    assert lean_decode_bytes(WAN22_VAE, size) / GIB == pytest.approx(decode_gib, rel=0.06)
    assert lean_encode_bytes(WAN22_VAE, size) / GIB == pytest.approx(encode_gib, rel=0.10)


def test_a_small_budget_is_named_as_it_was_given() -> None:
    for num_bytes, words in ((10 * 2**20, "no plan fits into 10.0 MiB:"), (GIB, "no plan fits into 1.0 GiB:")):
        with pytest.raises(MemoryBudgetError, match=words):
            planned(num_bytes / GIB)
    with pytest.raises(MemoryBudgetError, match=r"host memory in nf4, and 300\.0 MiB are allowed"):
        planned(24, host_gib=300 / 1024)


def test_a_card_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="rtx4090"):
        device_rates("abacus")
    assert CONTEXT_BYTES < GIB
