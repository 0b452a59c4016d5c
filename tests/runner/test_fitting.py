"""A run within limits gives the frames of a run without; one that overflows goes on where it was."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory import plan as plan_module
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.memory.plan import CONTEXT_BYTES
from swifti2v.memory.ways import stored_bytes
from swifti2v.runner import fitting, loading
from swifti2v.runner.acceleration import Acceleration
from swifti2v.runner.fitting import networks_of, place, plan_for
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.stage_one import StageOne
from swifti2v.stage_two import StageTwo
from swifti2v.wan import feature_offload
from swifti2v.wan.quantized_linear import stored_narrow
from swifti2v.wan.streaming import WanStreamingCodec
from swifti2v.wan.tiling import Tiling

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.memory.plan import MemoryPlan
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import Quantization, Storage

LIMITLESS = MemoryLimits()


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver holds is more than these networks have altogether."""
    monkeypatch.setattr(plan_module, "CONTEXT_BYTES", 0)


def opened(checkpoint: Path, memory: MemoryLimits | None) -> TwoStagePipeline:
    return TwoStagePipeline.from_pretrained(checkpoint, device="cpu", memory=memory)


def frames_of(pipeline: TwoStagePipeline) -> torch.Tensor:
    image = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))
    return pipeline(image, "a wave").frames


SMALL = {"size": Size(288, 224), "num_frames": 9, "segment_size": 1, "seed": 5}


@dataclass
class Exercised:
    """What a run has done: tiles that were decoded, tensors that were parked, blocks that came to the device."""

    tiles: int = 0
    parked: int = 0
    streamed: int = 0


@pytest.fixture
def exercised(monkeypatch: pytest.MonkeyPatch) -> Exercised:
    from diffusers.hooks.group_offloading import ModuleGroup

    counts = Exercised()

    def counted(owner: Any, name: str, counter: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            setattr(counts, counter, getattr(counts, counter) + 1)
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    counted(WanStreamingCodec, "_decode_tile", "tiles")
    counted(feature_offload, "_on_host", "parked")
    counted(ModuleGroup, "onload_", "streamed")
    return counts


def patch_decoding(monkeypatch: pytest.MonkeyPatch, behave: Any) -> None:
    """Let `behave` stand in for the decoding of a run, and not where costs are measured on the meta device."""
    decode = WanStreamingCodec._decode_group

    def call(self: WanStreamingCodec, latents: torch.Tensor, *others: Any) -> list[torch.Tensor]:
        return decode(self, latents, *others) if latents.is_meta else behave(self, latents, *others)

    monkeypatch.setattr(WanStreamingCodec, "_decode_group", call)


def small_frames(parts: Parts) -> torch.Tensor:
    image = PIL.Image.linear_gradient("L").convert("RGB").resize((288, 224))
    return TwoStagePipeline(parts)(image, "a wave", **SMALL).frames


def plan_within(parts: Parts, device_bytes: int | None) -> MemoryPlan:
    return plan_for(parts, parts.defaults.settled(SMALL), MemoryLimits(device_bytes))


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def budget_of(parts: Parts, *, tiles: int, parks: bool) -> int:
    """Walk down the budgets until a plan cuts the frame so."""
    plan = plan_within(parts, None)
    while (plan.codec.columns * plan.codec.rows, plan.codec.offloads_features) != (tiles, parks):
        plan = plan_within(parts, plan.peak_bytes - 1)
    return plan.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("tiles", "parks"), [(1, True), (2, True), (4, True)], ids=["untiled", "2 tiles", "4 tiles"])
def test_a_run_within_a_budget_equals_a_resident_run_of_the_same_tiles(
    tiny_checkpoint: Path, exercised: Exercised, tiles: int, parks: bool
) -> None:
    """Everything that a plan changes but tiling leaves the frames as they are; the tiles are laid by hand here."""
    whole = opened(tiny_checkpoint, None).parts
    tight = opened(tiny_checkpoint, LIMITLESS).parts
    budget = budget_of(tight, tiles=tiles, parks=parks)
    plan = plan_within(tight, budget)
    assert "resident" not in {way.placement for way in plan.ways}
    codec = WanStreamingCodec(whole.stage_two.codec.vae, tiling=Tiling(plan.codec.tile) if tiles > 1 else None)
    two = StageTwo(whole.stage_two.transformer, codec, uses_prompt=whole.stage_two.uses_prompt)
    expected = small_frames(replace(whole, stage_two=two, overlap="none"))
    assert exercised.parked == exercised.streamed == 0
    exercised.tiles = 0
    actual = small_frames(replace(tight, memory=MemoryLimits(budget)))
    assert exercised.tiles == tiles * 3  # one visit for the anchor, one for each segment
    assert exercised.parked > 10 * tiles
    assert largest_difference(actual, expected) <= 1
    assert float(expected.float().std()) > 1


@pytest.mark.slow
def test_streamed_networks_of_both_stages_give_the_frames_of_resident_ones(
    tiny_checkpoint: Path, exercised: Exercised
) -> None:
    expected = small_frames(replace(opened(tiny_checkpoint, None).parts, overlap="none"))
    parts = opened(tiny_checkpoint, LIMITLESS).parts
    plan = plan_within(parts, None)
    streamed = replace(plan, ways=tuple(replace(way, placement="streamed") for way in plan.ways))
    networks = PlacedNetworks(parts.device)
    placed = place(parts, streamed, networks)
    actual = small_frames(replace(placed, memory=None))
    networks.release()
    assert exercised.streamed > 30  # every layer of the text encoder, every block, in each of their passes
    assert largest_difference(actual, expected) <= 1
    before = exercised.streamed
    assert largest_difference(small_frames(replace(parts, overlap="none")), expected) <= 1
    assert exercised.streamed == before  # released


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float8", "nf4"])
def test_weights_are_stored_narrower_where_the_host_has_no_room_and_the_video_stays(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stored: Storage
) -> None:
    """By the loader, before any run; and by a run, where only its offloaded features leave no room."""
    wider: Storage = "float32"
    for module in (fitting, loading):
        # Of networks as narrow as these, float8 takes less than nf4, which leaves more weights as they are.
        monkeypatch.setattr(module, "storages_of", lambda _dtype: (wider, stored))
    whole = opened(tiny_checkpoint, None).parts
    expected = small_frames(replace(whole, overlap="none")).float()
    described = networks_of(whole)
    too_little = stored_bytes(described, wider) - 1
    assert stored_bytes(described, stored) < too_little
    by_loader = opened(tiny_checkpoint, MemoryLimits(None, too_little)).parts
    budget = budget_of(whole, tiles=2, parks=True)
    parked = max(way.offloaded_bytes for way in plan_within(whole, budget).ways)
    room = stored_bytes(described, wider)
    by_run = opened(tiny_checkpoint, MemoryLimits(None, room)).parts
    by_run = replace(by_run, memory=MemoryLimits(budget, room + parked - 1))
    networks = (*by_loader.transformers, by_loader.stage_one.pipeline.text_encoder)
    assert [stored_narrow(network) for network in networks] == [stored] * 4
    assert stored_narrow(by_run.stage_two.transformer) is None
    for parts in (by_loader, by_run):
        assert plan_for(parts, parts.defaults.settled(SMALL), parts.memory or LIMITLESS).storage == stored
        frames = small_frames(parts).float()
        assert stored_narrow(parts.stage_two.transformer) == stored
        assert plan_for(parts, parts.defaults.settled(SMALL), LIMITLESS).storage == stored  # and stays so
        assert parts.stage_two.transformer.dtype == torch.float32  # the dtype of the work
        assert not torch.equal(frames, expected)
        error = float((frames - expected).square().mean())
        assert error < 0.05 * float(expected.var())


@pytest.mark.slow
def test_streamed_networks_in_four_bits_give_the_frames_of_resident_ones(
    tiny_checkpoint: Path, exercised: Exercised
) -> None:
    parts = opened(tiny_checkpoint, LIMITLESS).parts
    narrow = replace(plan_within(parts, None), storage="nf4")
    frames = []
    for placement in ("resident", "loaded", "streamed"):
        networks = PlacedNetworks(parts.device)
        plan = replace(narrow, ways=tuple(replace(way, placement=placement) for way in narrow.ways))
        frames.append(small_frames(replace(place(parts, plan, networks), memory=None)))
        networks.release()
    assert exercised.streamed > 30
    assert stored_narrow(parts.stage_two.transformer) == "nf4"
    assert largest_difference(frames[1], frames[0]) <= 1
    assert largest_difference(frames[2], frames[0]) <= 1


@pytest.mark.parametrize("quantization", ["float8", "int8"])
def test_products_that_the_host_has_no_room_for_are_refused_before_anything_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> None:
    monkeypatch.setattr(loading, "load_stage_two_transformer", lambda *_, **__: pytest.fail("read"))
    acceleration = Acceleration("native", quantization=quantization)
    with pytest.raises(InvalidInputError):
        load_parts(tiny_checkpoint, device="cpu", memory=MemoryLimits(None, 1000), acceleration=acceleration)


def test_an_overflow_goes_on_with_a_tighter_plan_and_keeps_finished_segments(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = frames_of(opened(tiny_checkpoint, None))
    pipeline = opened(tiny_checkpoint, LIMITLESS)
    decode, calls = WanStreamingCodec._decode_group, []
    forwards = []
    pipeline.parts.stage_two.transformer.register_forward_hook(lambda *_: forwards.append(1))

    def full_once(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, *arguments)

    patch_decoding(monkeypatch, full_once)
    with caplog.at_level(logging.WARNING, logger="swifti2v"):
        actual = frames_of(pipeline)
    assert "ran out of memory; going on with a plan of" in caplog.text
    assert actual.shape == expected.shape  # no frame is lost, and none comes twice
    assert torch.equal(actual[0], expected[0])  # handed out before the overflow
    settings = pipeline.defaults
    segments = len(pipeline.parts.stage_two.plan(settings))
    assert len(forwards) == segments * settings.num_inference_steps  # the finished segment was not made again


def test_a_full_device_is_known_by_what_libraries_say_of_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no room for the workspace, in the words of cuDNN; another error ends the run."""
    decode, errors = WanStreamingCodec._decode_group, []

    def refused(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        if errors:
            raise errors.pop()
        return decode(self, *arguments)

    patch_decoding(monkeypatch, refused)
    pipeline = opened(tiny_checkpoint, LIMITLESS)
    errors.append(RuntimeError("GET was unable to find an engine to execute this computation"))
    with caplog.at_level(logging.WARNING, logger="swifti2v"):
        assert len(frames_of(pipeline)) == pipeline.defaults.num_frames
    assert caplog.text.count("going on with a plan of") == 1
    errors.append(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        frames_of(pipeline)


def test_a_preview_is_placed_too_and_goes_on_after_an_overflow(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def motion_of(pipeline: TwoStagePipeline) -> torch.Tensor:
        image = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))
        pieces = pipeline.preview(pipeline.request(image, "a wave"))
        return torch.cat([piece.frames for piece in pieces])

    expected = motion_of(opened(tiny_checkpoint, None))
    generate, plans = StageOne.generate, []
    placed = fitting.place
    monkeypatch.setattr(fitting, "place", lambda parts, plan, to: plans.append(plan) or placed(parts, plan, to))

    def full_once(self: StageOne, *arguments: Any, **options: Any) -> Any:
        if len(plans) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(StageOne, "generate", full_once)
    with caplog.at_level(logging.WARNING, logger="swifti2v"):
        actual = motion_of(opened(tiny_checkpoint, LIMITLESS))
    assert len(plans) == 2
    assert plans[1].peak_bytes < plans[0].peak_bytes
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=2)


def test_the_end_of_all_plans_is_one_clear_error(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_decoding(monkeypatch, full)
    with pytest.raises(MemoryBudgetError, match=r"ran out of memory \(CUDA out of memory\) with the smallest"):
        frames_of(opened(tiny_checkpoint, LIMITLESS))
    monkeypatch.undo()
    with pytest.raises(MemoryBudgetError, match="needs"):
        frames_of(opened(tiny_checkpoint, MemoryLimits(1000)))


def test_without_limits_an_overflow_is_the_callers(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_decoding(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        frames_of(opened(tiny_checkpoint, None))


def test_limits_are_read_from_words() -> None:
    assert MemoryLimits.parse("24GiB", "64GiB") == MemoryLimits(24 * 2**30, 64 * 2**30)


def test_automatic_limits_are_what_is_free_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("given back"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (5 * 2**30, 0))
    second = torch.device("cuda:1")
    limits = MemoryLimits.parse("auto", "64GiB").on(second)
    assert limits == MemoryLimits(5 * 2**30 + CONTEXT_BYTES, 64 * 2**30)
    # What PyTorch keeps of a model that was there before is no other program's.
    assert asked == ["given back", second]
    assert MemoryLimits.parse("auto").on(torch.device("cpu")) == LIMITLESS
    assert MemoryLimits(7).on(second) == MemoryLimits(7)


def test_a_device_that_is_full_while_networks_are_placed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with a tighter plan, and no hook of the first stays on a network."""
    pipeline = opened(tiny_checkpoint, LIMITLESS)
    expected = frames_of(pipeline)
    original, calls = fitting.PlacedNetworks.place, []

    def full_once(self: Any, network: torch.nn.Module, placement: Any, **options: Any) -> None:
        calls.append(placement)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("on the way in")
        original(self, network, placement, **options)

    monkeypatch.setattr(fitting.PlacedNetworks, "place", full_once)
    torch.testing.assert_close(frames_of(pipeline).int(), expected.int(), rtol=0, atol=1)
    assert len(calls) > 3
    for network in (*pipeline.parts.transformers, pipeline.parts.stage_one.pipeline.text_encoder):
        modules = list(network.modules())
        assert not any(hasattr(module, "_hf_hook") for module in modules)
        assert not any(module._diffusers_hook.hooks for module in modules if hasattr(module, "_diffusers_hook"))


def test_parts_stay_as_they_were_loaded(tiny_checkpoint: Path) -> None:
    pipeline = opened(tiny_checkpoint, LIMITLESS)
    loaded = pipeline.parts
    frames_of(pipeline)
    assert pipeline.parts is loaded


def test_decoding_runs_beside_denoising_where_the_plan_has_room(tiny_checkpoint: Path) -> None:
    parts = opened(tiny_checkpoint, LIMITLESS).parts
    roomy = plan_within(parts, None)
    tight = plan_within(parts, roomy.peak_bytes - 1)
    assert tight.peak_bytes < roomy.peak_bytes
    for plan, asked, expected in ((roomy, "decode", "decode"), (tight, "decode", "write"), (roomy, "none", "none")):
        networks = PlacedNetworks(parts.device)
        placed = place(replace(parts, overlap=asked), plan, networks)
        networks.release()
        assert placed.overlap == expected
