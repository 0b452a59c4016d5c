"""Float8 products in the embedded model: what they cost in quality, and that memory plans count them."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch

from swifti2v.geometry import Size
from swifti2v.memory.placement import PlacedNetworks, is_stored_narrow
from swifti2v.models.float8_products import has_float8_products, use_float8_products
from swifti2v.pipelines.acceleration import Acceleration, transformers_of
from swifti2v.pipelines.fitting import MemoryLimits, dimensions_of, place, plan_for
from swifti2v.pipelines.loading import load_parts
from swifti2v.pipelines.options import GenerationOptions
from swifti2v.pipelines.two_stage import TwoStagePipeline

PHOTO = Path(__file__).parents[2] / "examples" / "lake-sherburne.jpg"
OPTIONS = GenerationOptions(size=Size(320, 192), num_frames=17, seed=1)
CPU = torch.device("cpu")


def decibels(frames: torch.Tensor, others: torch.Tensor) -> float:
    error = (frames.float() - others.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


@pytest.mark.slow
def test_float8_products_change_the_video_of_mini_a_little() -> None:
    """Stage II alone, whose reference is the same: 82.5 dB when this was written; then both stages: 46.1."""
    pipeline = TwoStagePipeline(load_parts("mini", device=CPU))
    with PIL.Image.open(PHOTO) as photo:
        image = photo.convert("RGB").resize(OPTIONS.size or (0, 0))

    def frames() -> torch.Tensor:
        return pipeline(image, "the camera pans left", options=OPTIONS).frames

    exact = frames()
    for network, least in (
        (pipeline.parts.stage_two.transformer, 70),
        (pipeline.parts.stage_one.pipeline.transformer, 40),
    ):
        use_float8_products([network], device=CPU)
        made = frames()
        assert not torch.equal(made, exact)
        assert decibels(made, exact) > least


def test_a_plan_counts_float8_products_and_stores_nothing_twice() -> None:
    unlimited = MemoryLimits()
    exact = load_parts("mini", device=CPU, memory=unlimited)
    parts = load_parts("mini", device=CPU, memory=unlimited, acceleration=Acceleration("native", quantization="float8"))
    assert all(map(has_float8_products, transformers_of(parts)))
    assert not dimensions_of(exact).float8_products
    assert dimensions_of(parts).float8_products
    settings = parts.defaults.settled(OPTIONS)
    before, plan = (plan_for(each, settings, unlimited) for each in (exact, parts))
    assert plan.weight_dtype == before.weight_dtype == "float32"
    assert plan.host_bytes < before.host_bytes
    weights = {name: tensor.clone() for name, tensor in parts.stage_two.transformer.state_dict().items()}
    tight = plan_for(parts, settings, MemoryLimits(None, plan.host_bytes - 1))
    assert tight.weight_dtype == "float8"  # the text encoder's alone
    networks = PlacedNetworks(parts.device)
    place(parts, tight, networks)
    networks.release()
    assert is_stored_narrow(parts.stage_one.pipeline.text_encoder)
    after = parts.stage_two.transformer.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in weights.items())
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in weights.items())
    assert plan_for(parts, settings, unlimited).weight_dtype == "float8"
