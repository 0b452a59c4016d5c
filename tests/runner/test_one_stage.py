"""Pipelines of one stage: they need nothing of the other's weights, and two of them make what one of both makes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import InvalidInputError, WorkDirectoryError
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.ways import stored_bytes
from swifti2v.runner.acceleration import Acceleration
from swifti2v.runner.fitting import networks_of, plan_for
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.taehv import LightDecoder
from tests.runner.light_weights import write_light_weights
from tests.runner.whole_runs import frames_of

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS = {"num_frames": 13, "seed": 3, "stage_one_steps": 1, "num_inference_steps": 2, "segment_size": 1}
IMAGE = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))
WEIGHTS = {"stage_one": ("stage_one", "adapters"), "stage_two": ("stage_two",)}


@pytest.fixture
def of_stage(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., TwoStagePipeline]:
    """Load one stage of a checkpoint from which the weights of the other were removed."""

    def load(stage: Any, **options: Any) -> TwoStagePipeline:
        root = Path(shutil.copytree(tiny_checkpoint, tmp_path / stage))
        for other, folders in WEIGHTS.items():
            for folder in folders if other != stage else ():
                for file in (root / folder).rglob("*.safetensors"):
                    file.unlink()
        return TwoStagePipeline.of_stage(root, stage, device="cpu", **options)

    return load


def num_parameters(network: torch.nn.Module) -> tuple[int, int]:
    """Numbers that a network has, and those of them that take memory."""
    sizes = [(tensor.numel(), not tensor.is_meta) for tensor in network.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_held in sizes if is_held)


def test_only_the_networks_of_the_stage_hold_numbers(
    of_stage: Callable[..., TwoStagePipeline], tiny_checkpoint: Path
) -> None:
    whole = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu").parts
    for stage in ("stage_one", "stage_two"):
        parts = of_stage(stage).parts
        pipeline = parts.stage_one.pipeline
        networks = {
            "stage_one": (pipeline.text_encoder, pipeline.transformer, pipeline.transformer_2, pipeline.vae),
            "stage_two": (parts.stage_two.transformer, parts.stage_two.codec.vae),  # type: ignore[attr-defined]  # Wan's
        }
        for owner, found in networks.items():
            for network in found:
                total, held = num_parameters(network)
                assert total > 0
                assert held == (total if owner == stage else 0)
        assert len(parts.transformers) == (2 if stage == "stage_one" else 1)
        assert (parts.defaults, parts.stage_two.geometry) == (whole.defaults, whole.stage_two.geometry)
        assert (parts.stage_one.geometry, parts.name) == (whole.stage_one.geometry, whole.name)
        assert parts.stage_two.transformer.dtype == whole.stage_two.transformer.dtype


@pytest.mark.parametrize("memory", [None, "1GiB"])
def test_two_pipelines_share_a_work_directory(
    of_stage: Callable[..., TwoStagePipeline], tiny_checkpoint: Path, tmp_path: Path, memory: str | None
) -> None:
    limits = None if memory is None else MemoryLimits.parse(memory)
    whole = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu", memory=limits)
    expected = frames_of(whole.stream(whole.request(IMAGE, "pan left", **OPTIONS)))
    one, two = of_stage("stage_one", memory=limits), of_stage("stage_two", memory=limits)
    work = tmp_path / "work"
    motion = frames_of(one.preview(one.request(IMAGE, "pan left", **OPTIONS), work_dir=work))
    assert motion.shape == (13, 16, 16, 3)
    actual = frames_of(two.stream(two.request(IMAGE, "pan left", **OPTIONS), work_dir=work))
    assert torch.equal(actual, expected)


def test_what_a_pipeline_cannot_do_alone_is_refused(of_stage: Callable[..., TwoStagePipeline], tmp_path: Path) -> None:
    one, two = of_stage("stage_one"), of_stage("stage_two")
    request = two.request(IMAGE, "pan left", **OPTIONS)
    with pytest.raises(InvalidInputError, match="Stage I alone; make a preview"):
        next(one.stream(request))
    with pytest.raises(InvalidInputError, match="Stage II alone"):
        next(two.preview(request))
    with pytest.raises(
        WorkDirectoryError, match="no finished motion reference of this prompt; run Stage I there first"
    ):
        next(two.stream(request, work_dir=tmp_path / "empty"))
    work = tmp_path / "work"
    list(one.preview(request, work_dir=work))
    with pytest.raises(WorkDirectoryError, match="a run with another prompt"):
        next(two.stream(replace(request, prompt="pan right"), work_dir=work))
    guided = replace(request, settings=replace(request.settings, guidance_scale=2.0))
    with pytest.raises(WorkDirectoryError, match="of this prompt"):
        next(two.stream(guided, work_dir=work))
    list(one.preview(guided, work_dir=work))  # with the negative prompt, and without Stage I again
    assert frames_of(two.stream(guided, work_dir=work)).shape == (13, 64, 64, 3)


def test_a_prompt_that_is_damaged_is_named(of_stage: Callable[..., TwoStagePipeline], tmp_path: Path) -> None:
    one, two = of_stage("stage_one"), of_stage("stage_two")
    request = two.request(IMAGE, "pan left", **OPTIONS)
    list(one.preview(request, work_dir=tmp_path / "work"))
    (prompt,) = (tmp_path / "work").glob("prompt_*")
    prompt.write_bytes(prompt.read_bytes()[:-4])
    with pytest.raises(WorkDirectoryError, match="damaged"):
        next(two.stream(request, work_dir=tmp_path / "work"))


def test_what_there_is_to_say_of_a_prompt_is_the_same(
    of_stage: Callable[..., TwoStagePipeline], tiny_checkpoint: Path
) -> None:
    whole, two = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu"), of_stage("stage_two")
    for prompt in ("", "pan", "a very long prompt, longer than sixteen letters"):
        assert two.request(IMAGE, prompt, **OPTIONS).notes == whole.request(IMAGE, prompt, **OPTIONS).notes


def test_the_light_decoder_is_loaded_for_stage_two_only(
    of_stage: Callable[..., TwoStagePipeline], tmp_path: Path
) -> None:
    weights = write_light_weights(tmp_path / "light.safetensors")
    light = Acceleration("native", decoder="light", decoder_weights=str(weights))
    assert isinstance(of_stage("stage_two", acceleration=light).parts.decoder, LightDecoder)
    weights.unlink()
    assert of_stage("stage_one", acceleration=light).parts.decoder is None


def test_a_memory_plan_counts_what_is_held(of_stage: Callable[..., TwoStagePipeline], tiny_checkpoint: Path) -> None:
    whole = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu").parts
    settings = whole.defaults.settled(OPTIONS)
    one, two = (of_stage(stage).parts for stage in ("stage_one", "stage_two"))
    held = [stored_bytes(networks_of(parts), "float32") for parts in (one, two, whole)]
    assert held[0] + held[1] == held[2]
    phases = [[way.phase for way in plan_for(parts, settings, MemoryLimits(2**30)).ways] for parts in (one, two, whole)]
    assert phases == [["text encoding", "stage one"], ["refinement"], ["text encoding", "stage one", "refinement"]]
