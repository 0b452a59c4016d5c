"""What only a CUDA device can show: streams, pinned transfers, kernels. Each run is compared with a plainer one.

``make test`` runs them where there is a device. Sizes are tiny, so that a laptop's card is enough.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import PIL.Image
import pytest
import torch

from swifti2v.geometry import Size
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.runner.acceleration import Acceleration, compile_blocks
from swifti2v.runner.fitting import place, plan_for
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.stage_two import StageTwo
from swifti2v.wan.quantized_linear import LAYERS, quantization_of, stored_narrow
from swifti2v.wan.streaming import CodecSettings, WanStreamingCodec
from swifti2v.wan.tiling import Tiling

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.memory.ways import Placement
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import Quantization

pytestmark = pytest.mark.gpu

OPTIONS = {"size": Size(288, 224), "num_frames": 17, "segment_size": 1, "seed": 5}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(params=["mini", "tiny"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> str:
    """The embedded model, with its transported reference; and Wan's own layout, with random weights."""
    return "mini" if request.param == "mini" else str(tiny_checkpoint)


def frames_of(parts: Parts) -> torch.Tensor:
    image = PIL.Image.radial_gradient("L").convert("RGB").resize((288, 224))
    return TwoStagePipeline(parts)(image, "the camera pans left", **OPTIONS).frames


def decibels(frames: torch.Tensor, others: torch.Tensor) -> float:
    error = (frames.double() - others.double()).square().mean().clamp(min=1e-9)
    return float(10 * torch.log10(255**2 / error))


def test_the_video_is_the_one_that_a_cpu_makes(device: torch.device, checkpoint: str) -> None:
    here = frames_of(load_parts(checkpoint, device="cpu", dtype=torch.float32))
    there = frames_of(load_parts(checkpoint, device=device, dtype=torch.float32))
    assert decibels(there, here) > 35


@pytest.mark.parametrize("overlap", ["decode", "write"])
def test_threads_and_streams_change_nothing(device: torch.device, checkpoint: str, overlap: str) -> None:
    """A read that is not ordered behind its write shows now and then, hence more than one run."""
    parts = load_parts(checkpoint, device=device)
    expected = frames_of(replace(parts, overlap="none"))
    for _run in range(3):
        assert torch.equal(frames_of(replace(parts, overlap=overlap)), expected)


@pytest.mark.parametrize("placement", ["loaded", "streamed"])
def test_placed_networks_make_the_frames_of_resident_ones(
    device: torch.device, tiny_checkpoint: Path, placement: Placement
) -> None:
    expected = frames_of(replace(load_parts(tiny_checkpoint, device=device), overlap="none"))
    parts = load_parts(tiny_checkpoint, device=device, memory=MemoryLimits())
    plan = plan_for(parts, parts.defaults.settled(OPTIONS), MemoryLimits())
    moved = replace(plan, ways=tuple(replace(way, placement=placement) for way in plan.ways))
    for _run in range(2):
        networks = PlacedNetworks(device)
        placed = place(parts, moved, networks)
        frames = frames_of(replace(placed, memory=None, overlap="none"))
        networks.release()
        assert decibels(frames, expected) > 45
    assert {next(network.parameters()).device.type for network in parts.transformers} == {"cpu"}


def test_parked_features_come_back_whole(device: torch.device, tiny_checkpoint: Path) -> None:
    parts = load_parts(tiny_checkpoint, device=device)
    two = parts.stage_two
    frames = []
    for parks in (False, True):
        codec = WanStreamingCodec(two.codec.vae, settings=CodecSettings(Tiling(Size(208, 176)), True, 1, parks))
        tiled = StageTwo(two.transformer, codec, uses_prompt=two.uses_prompt)
        frames.append(frames_of(replace(parts, stage_two=tiled, overlap="none")))
    assert torch.equal(frames[0], frames[1])


def test_a_full_device_is_met_with_a_tighter_plan(
    device: torch.device, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses one call of the decoder, as a card does that something else has filled."""
    parts = load_parts(tiny_checkpoint, device=device, memory=MemoryLimits())
    expected = frames_of(parts)
    decode, refused = WanStreamingCodec._decode_group, []

    def full_once(codec: WanStreamingCodec, *arguments: object, **options: object) -> object:
        if not refused:
            refused.append(torch.cuda.memory_allocated(device))
            torch.cuda.set_per_process_memory_fraction(1e-9, device)
            try:
                return torch.empty(2**31, device=device)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        return decode(codec, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(WanStreamingCodec, "_decode_group", full_once)
    assert decibels(frames_of(parts), expected) > 30
    assert refused


def test_compiled_blocks_make_the_same_video_in_the_thread_of_stage_two(
    device: torch.device, tiny_checkpoint: Path
) -> None:
    parts = load_parts(tiny_checkpoint, device=device)
    expected = frames_of(parts)
    torch._dynamo.reset()
    compile_blocks(parts.transformers)
    assert decibels(frames_of(parts), expected) > 30


@pytest.mark.parametrize("quantization", ["float8", "int8"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_products_in_eight_bits(device: torch.device, quantization: Quantization, compiled: bool) -> None:
    """In `mini`, whose sides float8 takes; of one layer: `tests/wan/test_quantized_linear.py`."""
    if torch.cuda.get_device_capability(device) < LAYERS[quantization].least_capability:
        pytest.skip(f"no card with {quantization} products")
    torch._dynamo.reset()
    acceleration = Acceleration("native", quantization=quantization, compile_blocks=compiled)
    parts = load_parts("mini", device=device, acceleration=acceleration)
    assert {quantization_of(network) for network in parts.transformers} == {quantization}
    expected = frames_of(load_parts("mini", device=device))
    assert decibels(frames_of(parts), expected) > 30


@pytest.mark.parametrize("placement", ["resident", "loaded", "streamed"])
def test_weights_in_four_bits_are_placed_as_others_are(
    device: torch.device, tiny_checkpoint: Path, placement: Placement
) -> None:
    no_room, exact = MemoryLimits(None, 1), torch.float32
    here = load_parts(tiny_checkpoint, device="cpu", memory=no_room)
    parts = load_parts(tiny_checkpoint, device=device, dtype=exact, memory=no_room)
    for each in (here, parts):
        assert {stored_narrow(network) for network in each.transformers} == {"nf4"}
    settings = parts.defaults.settled(OPTIONS)
    plan = plan_for(parts, settings, MemoryLimits())
    assert plan.storage == "nf4"
    moved = replace(plan, ways=tuple(replace(way, placement=placement) for way in plan.ways))
    expected = frames_of(replace(here, memory=None))
    for _run in range(2):
        networks = PlacedNetworks(device)
        frames = frames_of(replace(place(parts, moved, networks), memory=None, overlap="none"))
        networks.release()
        assert decibels(frames, expected) > 35


@pytest.mark.parametrize("quantization", ["float8", "int8"])
def test_streamed_blocks_with_products_in_eight_bits(device: torch.device, quantization: Quantization) -> None:
    if torch.cuda.get_device_capability(device) < LAYERS[quantization].least_capability:
        pytest.skip(f"no card with {quantization} products")
    acceleration = Acceleration("native", quantization=quantization)
    expected = frames_of(replace(load_parts("mini", device=device, acceleration=acceleration), overlap="none"))
    parts = load_parts("mini", device=device, memory=MemoryLimits(), acceleration=acceleration)
    plan = plan_for(parts, parts.defaults.settled(OPTIONS), MemoryLimits())
    moved = replace(plan, ways=tuple(replace(way, placement="streamed") for way in plan.ways))
    networks = PlacedNetworks(device)
    frames = frames_of(replace(place(parts, moved, networks), memory=None, overlap="none"))
    networks.release()
    assert decibels(frames, expected) > 45


def test_attention_is_chosen_by_trial(device: torch.device, tiny_checkpoint: Path) -> None:
    expected = frames_of(load_parts(tiny_checkpoint, device=device))
    chosen = frames_of(load_parts(tiny_checkpoint, device=device, acceleration=Acceleration(attention="auto")))
    assert decibels(chosen, expected) > 30


def test_runs_do_not_take_more_and_more_memory(device: torch.device, tiny_checkpoint: Path) -> None:
    """Freed blocks belong to their stream: a new stream a run would find none of them."""
    parts = load_parts(tiny_checkpoint, device=device)
    loaded = torch.cuda.memory_allocated(device)
    reserved = []
    for _run in range(4):
        frames_of(parts)
        reserved.append(torch.cuda.memory_reserved(device))
    # Threads meet otherwise in every run, and blocks lie otherwise; a new stream would add what a run holds.
    assert reserved[-1] - reserved[1] < (reserved[1] - loaded) / 4
