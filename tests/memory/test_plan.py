"""Properties of plans: they fit, more memory is never slower, length changes nothing, refusals say what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory import measure as measuring
from swifti2v.memory.amounts import GIB
from swifti2v.memory.devices import DEVICES, device_rates
from swifti2v.memory.networks import STORAGES, WAN22, Network
from swifti2v.memory.plan import CONTEXT_BYTES, MemoryPlan, plan_memory, plan_stages, tighter_budget
from swifti2v.memory.ways import GRIDS, RunCosts, stored_bytes, tile_size
from swifti2v.settings import GenerationSettings

if TYPE_CHECKING:
    from swifti2v.memory.networks import PipelineNetworks

SETTINGS = GenerationSettings()
LIGHT = WAN22.with_light_decoder()
FLOAT8, INT8 = (replace(WAN22, quantization=quantization) for quantization in ("float8", "int8"))
RTX_4090 = device_rates("RTX 4090")
CARDS = sorted(rates.name for rates in DEVICES)


def planned(
    gib: float | None,
    *,
    host_gib: float | None = None,
    gpu: str = "RTX 4090",
    networks: PipelineNetworks = WAN22,
    **changes: Any,
) -> MemoryPlan:
    return plan_memory(
        networks,
        replace(SETTINGS, **changes),
        device_rates(gpu),
        budget_bytes=None if gib is None else int(gib * GIB),
        host_bytes=None if host_gib is None else int(host_gib * GIB),
    )


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
def test_every_named_budget_has_a_plan_that_fits(gib: int) -> None:
    plan = planned(gib)
    assert plan.peak_bytes <= gib * GIB
    assert [way.phase for way in plan.ways] == ["text encoding", "stage one", "refinement"]
    assert plan.storage == "bfloat16"
    assert plan.seconds < 1.5 * planned(None).seconds


# ---- one account ----


def placed_bytes(networks: PipelineNetworks, storage: Any) -> int:
    """Bytes of the tensors of whole networks on the meta device, stored by the functions that placement calls."""
    narrow = (storage if networks.quantization == "none" else "bfloat16", networks.quantization)
    transformers = [networks.stage_one] * networks.num_experts + [networks.stage_two]
    stored = [(network, "bfloat16", *narrow) for network in transformers]
    stored += [(networks.text_encoder, "bfloat16", storage, "none")]
    stored += [(networks.stage_one_codec, "float32", "bfloat16", "none")]
    stored += [(networks.stage_two_codec, "bfloat16", "bfloat16", "none")]
    total = 0
    for network, dtype, how, quantization in stored:
        built = measuring.build(network, dtype)
        measuring.store(built, how, quantization, dtype=dtype)
        total += sum(tensor.nbytes for tensor in (*built.parameters(), *built.buffers()))
    return total


def with_three_blocks(networks: PipelineNetworks) -> PipelineNetworks:
    shallow = {
        name: Network.of(getattr(networks, name).class_path, getattr(networks, name).config | {"num_layers": 3})
        for name in ("text_encoder", "stage_one", "stage_two")
    }
    return replace(networks, **shallow)


@pytest.mark.parametrize("storage", ["bfloat16", "float8", "int8", "nf4"])
def test_a_plan_counts_the_weights_that_placement_stores(storage: Any) -> None:
    networks = INT8 if storage == "int8" else WAN22
    how = "bfloat16" if storage == "int8" else storage
    shallow = with_three_blocks(networks)
    assert stored_bytes(shallow, how) == placed_bytes(shallow, how)
    blocks = [RunCosts(each, SETTINGS, how).weights for each in (networks, shallow)]
    assert all(blocks[0][name].block_bytes == blocks[1][name].block_bytes for name in blocks[0])
    for gib in (8, 12, 16, 24, 80):
        plan = plan_memory(networks, SETTINGS, RTX_4090, budget_bytes=gib * GIB, storages=(how,))
        assert plan.weight_bytes == stored_bytes(networks, how)
        assert plan.host_bytes == plan.weight_bytes + max(way.offloaded_bytes for way in plan.ways)


def test_quantized_transformers_take_one_byte_per_weight_and_the_text_encoder_two() -> None:
    narrow = stored_bytes(WAN22, "bfloat16") - stored_bytes(FLOAT8, "bfloat16")
    assert narrow == pytest.approx(2 * 14.29e9 + 5.0e9, rel=0.02)
    assert stored_bytes(FLOAT8, "float8") == pytest.approx(stored_bytes(WAN22, "float8"), rel=0.01)
    exact, float8 = planned(None), planned(None, networks=FLOAT8)
    assert exact.tasks == float8.tasks
    assert float8.seconds < exact.seconds


@pytest.mark.parametrize("storage", STORAGES)
def test_what_streams_has_room_for_three_blocks_and_what_is_in_none(storage: Any) -> None:
    """Embeddings stay in bfloat16 and come as a whole: beside blocks of four bits they are the larger part."""
    costs = RunCosts(WAN22, SETTINGS, storage)
    one = next(way for way in costs.ways(RTX_4090)[1] if way.placement == "streamed")
    weights = costs.weights["expert 0"]
    assert one.weight_bytes == 3 * weights.block_bytes + weights.outside_bytes
    assert weights.num_bytes == 40 * weights.block_bytes + weights.outside_bytes


# ---- what a run takes ----


def test_the_whole_run() -> None:
    tasks = {task.name: task for task in planned(None).tasks}
    tflop = {name: task.work.tflop for name, task in tasks.items()}
    assert tflop == pytest.approx(
        {
            "text encoding": 4.84,
            "stage one": 4 * 731.6 + 247.1,
            "reference encode": 1034,
            "stage two": 7009,
            "decode": 5403,
        },
        rel=0.001,
    )
    assert (tasks["stage one"].num_tokens, tasks["stage one"].num_forwards) == (18_480, 4)
    assert (tasks["stage two"].num_tokens, tasks["stage two"].num_forwards) == (17_600, 7 * 4)


def test_guidance_doubles_only_what_it_guides() -> None:
    plain, guided = planned(None), planned(None, guidance_scale=5.0)
    ratios = [after.work.tflop / before.work.tflop for before, after in zip(plain.tasks, guided.tasks, strict=True)]
    assert ratios == pytest.approx([2, 1, 1, 2, 1])


def test_kept_context_takes_less_work_and_more_memory() -> None:
    exact, kept = (planned(None, keep_context=keep) for keep in (False, True))
    assert 0.70 < kept.tasks[3].work.tflop / exact.tasks[3].work.tflop < 0.72  # 0.70 for all windows but the first
    assert kept.ways[2].working_bytes - exact.ways[2].working_bytes in {0, 2 * 3520 * 3072 * 2 * 2 * 30}
    once = [planned(None, keep_context=keep, num_inference_steps=1).tasks for keep in (False, True)]
    assert once[0] == once[1]


def test_quantized_matmul_halves_the_time_of_the_blocks() -> None:
    exact, float8 = (planned(None, gpu="H200", networks=networks) for networks in (WAN22, FLOAT8))
    blocks = sum(task.work.blocks for task in exact.tasks if task.name != "text encoding")
    text = exact.tasks[0].work.blocks
    assert exact.seconds - float8.seconds == pytest.approx(blocks * (1 / 700 - 1 / 1400), rel=0.01, abs=text / 700)


@pytest.mark.parametrize("gib", [8, 24, None])
def test_the_light_decoder_never_costs_time_or_memory(gib: int | None) -> None:
    exact, light = (planned(gib, gpu="H200", networks=networks) for networks in (WAN22, LIGHT))
    assert exact.seconds - light.seconds > 0.95 * (5403 - 26) / 650
    assert light.host_bytes <= exact.host_bytes + 2 * 10e6
    assert gib is None or light.peak_bytes <= gib * GIB
    with pytest.raises(InvalidInputError) as caught:
        replace(WAN22, stage_two_codec=WAN22.stage_two).with_light_decoder()
    assert caught.value.param == "decoder"


# ---- more memory, longer clips ----

Outcome = MemoryPlan | MemoryBudgetError
HOSTS = st.one_of(st.none(), st.floats(20, 130))


def outcome(gib: float, *, host_gib: float | None, gpu: str) -> Outcome:
    try:
        return planned(gib, host_gib=host_gib, gpu=gpu)
    except MemoryBudgetError as refusal:
        return refusal


def rank(plan: MemoryPlan) -> tuple[int, float]:
    """Exactness of the weights first, then time: less is better."""
    return STORAGES.index(plan.storage), round(plan.seconds, 6)


@given(st.floats(4, 120), st.floats(4, 120), st.sampled_from(CARDS), HOSTS)
@settings(max_examples=60)
def test_more_device_memory_is_never_worse_and_a_refusal_names_what_fits(
    one: float, other: float, gpu: str, host_gib: float | None
) -> None:
    less, more = sorted((one, other))
    tight, wide = (outcome(gib, host_gib=host_gib, gpu=gpu) for gib in (less, more))
    for gib, found in ((less, tight), (more, wide)):
        if isinstance(found, MemoryBudgetError):
            assert_named_budgets_fit(found, gib, host_gib, gpu)
        else:
            assert found.peak_bytes <= gib * GIB
            assert host_gib is None or found.host_bytes <= host_gib * GIB
    if isinstance(tight, MemoryPlan):
        assert isinstance(wide, MemoryPlan)
        assert rank(wide) <= rank(tight)


def assert_named_budgets_fit(refusal: MemoryBudgetError, gib: float, host_gib: float | None, gpu: str) -> None:
    enough: dict[str, int] = refusal.value  # type: ignore[assignment]
    assert enough
    if "device_bytes" in enough:
        assert enough["device_bytes"] > gib * GIB
        assert planned((enough["device_bytes"] + 1) / GIB, host_gib=host_gib, gpu=gpu)
    elif "host_bytes" in enough:  # nothing is said of the device before the host has room
        assert enough["host_bytes"] > (host_gib or 0) * GIB
        assert planned(120, host_gib=(enough["host_bytes"] + 1) / GIB, gpu=gpu).storage == "nf4"


@given(st.floats(5, 120), st.floats(20, 130), st.floats(20, 130))
@settings(max_examples=40)
def test_more_host_memory_is_never_worse(gib: float, one: float, other: float) -> None:
    less, more = sorted((one, other))
    tight, wide = (outcome(gib, host_gib=host, gpu="RTX 4090") for host in (less, more))
    if isinstance(tight, MemoryPlan):
        assert isinstance(wide, MemoryPlan)
        assert rank(wide) <= rank(tight)


@pytest.mark.parametrize("gib", [8, 24, None])
def test_plans_of_single_stages_are_the_phases_of_the_whole(gib: float | None) -> None:
    """Where phases take turns, each has the way that it has in the whole; only what stays on the device differs."""
    whole = {way.phase: way for way in planned(gib).ways}
    weights = 0
    for stage, phases in (("stage_one", 2), ("stage_two", 1)):
        plan = planned(gib, networks=replace(WAN22, stages=(stage,)))
        weights += plan.weight_bytes
        assert len(plan.ways) == phases
        for way in plan.ways:
            assert way.seconds <= whole[way.phase].seconds
            assert way == whole[way.phase] or "resident" in {way.placement, whole[way.phase].placement}
    assert weights == stored_bytes(WAN22, "bfloat16")


@pytest.mark.parametrize("gib", [8, 24])
def test_memory_is_flat_in_length_and_time_grows_with_it(gib: int) -> None:
    """Twice the windows of Stage I, a segment of three latent frames for every twelve frames."""
    one, two = (planned(gib, num_frames=count, segment_size=4) for count in (81, 157))
    assert two.peak_bytes == pytest.approx(one.peak_bytes, rel=0.02)
    assert 1.8 < two.seconds / one.seconds < 2.2


# ---- what is given up ----


def test_float8_is_taken_where_bfloat16_leaves_no_room_for_offloaded_features() -> None:
    """The weights fit into 76 GiB in bfloat16, but on 8 GiB of the device nothing runs without offloading 19 GiB."""
    assert planned(24, host_gib=76).storage == "bfloat16"
    tight = planned(8, host_gib=76)
    assert tight.storage == "float8"
    assert tight.codec.offloads_features
    assert "weights are stored in float8" in tight.given_up[0]
    assert planned(24, host_gib=28).storage == "nf4"


def test_stages_are_loaded_in_turn_where_both_have_no_room() -> None:
    both, *none = plan_stages(WAN22, SETTINGS, RTX_4090, budget_bytes=12 * GIB, host_bytes=94 * GIB)
    assert not none
    plans = plan_stages(WAN22, SETTINGS, RTX_4090, budget_bytes=12 * GIB, host_bytes=28 * GIB)
    assert [plan.storage for plan in plans] == ["nf4", "float8"]
    assert max(plan.host_bytes for plan in plans) <= 28 * GIB
    assert sum(plan.seconds for plan in plans) == pytest.approx(both.seconds, rel=0.02)


def test_decoding_runs_beside_denoising_where_there_is_room() -> None:
    assert planned(None).overlaps_decode
    for gib in (8, 16, 24, 48):
        plan = planned(gib)
        beside = replace(plan, overlaps_decode=True)
        assert max(way.overlap_bytes for way in plan.ways) > GIB
        assert plan.overlaps_decode == (beside.peak_bytes <= gib * GIB)


def test_unlimited_memory_gives_nothing_up_and_less_says_what() -> None:
    plan = planned(None, gpu="H200")
    assert {way.placement for way in plan.ways} == {"resident"}
    assert {way.weight_bytes for way in plan.ways} == {plan.weight_bytes}
    assert plan.given_up == ()
    assert (plan.codec.columns, plan.codec.rows, plan.codec.offloads_features) == (1, 1, False)
    tight = planned(8)
    assert tight.codec.offloads_features
    assert tight.codec.columns * tight.codec.rows > 1
    assert any("tiles" in note and "s more" in note for note in tight.given_up)


def test_the_budget_after_an_overflow_leads_to_a_smaller_plan() -> None:
    plan = planned(24)
    sizes = [plan.peak_bytes]
    for _ in range(4):
        plan = planned(tighter_budget(plan) / GIB)
        sizes.append(plan.peak_bytes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] > CONTEXT_BYTES


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_tiles_cover_the_frame_with_their_overlap(columns: int, rows: int) -> None:
    frame = Size(2560, 1408)
    tile = tile_size(frame, columns, rows, multiple=16)
    for length, side, count in ((frame.width, tile.width, columns), (frame.height, tile.height, rows)):
        assert side % 16 == 0
        assert count * side - (count - 1) * 128 >= length
        assert count == 1 or count * (side - 16) - (count - 1) * 128 < length


# ---- cards ----


@pytest.mark.parametrize(
    ("typed", "name", "gib"),
    [
        ("4090", "RTX 4090", 24),
        ("rtx 4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("rtx3060 12gb", "RTX 3060", 12),
        ("4060 Ti 16 GB", "RTX 4060 Ti", 16),
        ("5070ti", "RTX 5070 Ti", 16),
        ("a100", "A100 40GB", 40),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 79),
        ("NVIDIA H100 80GB HBM3", "H100", 79),
        ("h200", "H200", 140),
    ],
)
def test_cards_are_known_by_the_names_that_people_type(typed: str, name: str, gib: int) -> None:
    assert device_rates(typed).name == name
    assert device_rates(typed).memory_bytes == gib * GIB


@pytest.mark.parametrize("typed", ["abacus", "4070 Ti", "RTX 4090 Laptop GPU", ""])
def test_other_cards_are_refused(typed: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        device_rates(typed)
    assert (caught.value.param, caught.value.value) == ("gpu", typed)


@pytest.mark.parametrize("gpu", ["a100", "3090"])
def test_cards_without_float8_say_so(gpu: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        planned(None, gpu=gpu, networks=FLOAT8)
    assert (caught.value.param, caught.value.value) == ("quantization", "float8")
