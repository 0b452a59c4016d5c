"""Eight and four bits in the embedded model: what they cost in quality, and that memory plans count them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import pytest
import torch

from swifti2v.errors import MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.runner.acceleration import Acceleration
from swifti2v.runner.fitting import networks_of, place, plan_for
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.quantized_linear import quantization_of, store_weights, use_quantized_matmul

if TYPE_CHECKING:
    from swifti2v.settings import Quantization

PHOTO = Path(__file__).parents[2] / "examples" / "lake-sherburne.jpg"
OPTIONS = {"size": Size(320, 192), "num_frames": 17, "seed": 1, "refiner": "concat"}
CPU = torch.device("cpu")


def decibels(frames: torch.Tensor, others: torch.Tensor) -> float:
    error = (frames.float() - others.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def pipeline_and_image() -> tuple[TwoStagePipeline, PIL.Image.Image]:
    with PIL.Image.open(PHOTO) as photo:
        image = photo.convert("RGB").resize(OPTIONS["size"])
    return TwoStagePipeline(load_parts("mini", device=CPU)), image


@pytest.mark.slow
@pytest.mark.parametrize("way", ["float8", "int8", "nf4"])
def test_eight_and_four_bits_change_the_video_of_mini_a_little(way: str) -> None:
    """Of Stage II; in dB when this was written: float8 82.6, int8 86.6, four bits 80.2."""
    pipeline, image = pipeline_and_image()

    def frames() -> torch.Tensor:
        return pipeline(image, "the camera pans left", **OPTIONS).frames

    exact = frames()
    network = pipeline.parts.stage_two.transformer
    if way == "nf4":
        store_weights(network, "nf4", compute_dtype=torch.float32)
    else:
        use_quantized_matmul([network], "float8" if way == "float8" else "int8", device=CPU)
    made = frames()
    assert not torch.equal(made, exact)
    assert decibels(made, exact) > 70


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_a_plan_counts_a_quantized_matmul_and_stores_nothing_twice(kind: Quantization) -> None:
    unlimited = MemoryLimits()
    exact = load_parts("mini", device=CPU, memory=unlimited)
    parts = load_parts("mini", device=CPU, memory=unlimited, acceleration=Acceleration("native", quantization=kind))
    assert {quantization_of(network) for network in parts.transformers} == {kind}
    assert networks_of(exact).quantization == "none"
    assert networks_of(parts).quantization == kind
    settings = parts.defaults.settled(OPTIONS)
    before, plan = (plan_for(each, settings, unlimited) for each in (exact, parts))
    assert plan.storage == before.storage == "float32"
    assert plan.host_bytes < before.host_bytes
    with pytest.raises(MemoryBudgetError):  # what is quantized is stored no narrower, and there is nothing beside it
        plan_for(parts, settings, MemoryLimits(None, plan.host_bytes - 1))
    weights = {name: tensor.clone() for name, tensor in parts.stage_two.transformer.state_dict().items()}
    networks = PlacedNetworks(parts.device)
    place(parts, plan, networks)
    networks.release()
    after = parts.stage_two.transformer.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in weights.items())
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in weights.items())
