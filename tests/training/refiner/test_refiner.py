"""From a folder of videos to a checkpoint that generates: transition, Stage II, distillation, on tiny networks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.data.clips import ClipOptions
from swifti2v.data.latent_cache import LatentCache
from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError, LatentCacheError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.models.transformer import StageTwoTransformer
from swifti2v.pipelines.options import GenerationOptions
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.training.engine.distributed import Processes
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.refiner import run as refiner_run
from swifti2v.training.refiner.distillation import DistillationOptions
from swifti2v.training.refiner.encoding import EncodingOptions
from swifti2v.training.refiner.network import NetworkOptions, load_network, plain_state, save_network
from swifti2v.training.refiner.run import (
    DistillationRun,
    RefinerRun,
    TransitionRun,
    build_references,
    distill_refiner,
    train_refiner,
)
from swifti2v.training.refiner.segment_flow import SegmentFlowOptions
from swifti2v.training.refiner.transition import TransitionOptions
from swifti2v.training.refiner.validation import HeldOut, RefinerValidation, ValidationOfRefiner
from swifti2v.training.videos import VideoSelection

if TYPE_CHECKING:
    from pathlib import Path

LOOP = LoopOptions(
    num_steps=2, learning_rate=1e-3, warmup_steps=1, checkpoint_every=2, validate_every=2, log_every=1, bfloat16=False
)
NETWORK = NetworkOptions(lora_rank=2, lora_targets=("to_q", "to_v", "ffn.net.2"), frozen_dtype="float32")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 12 frames that slide over blobs, and a text file with the name of a video."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (224, 160), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(folder / f"clip_{seed}.mp4", size=Size(128, 128), fps=8) as writer:
            writer.write(np.stack([wide[16:144, 4 * t : 4 * t + 128] for t in range(12)]))
        (folder / f"clip_{seed}.txt").write_text("blobs slide to the left\n")
    (folder / "broken.mp4").write_text("this is no video")
    (folder / "broken.txt").write_text("nothing\n")
    return folder


@pytest.fixture(scope="module")
def transition(tiny_checkpoint: Path) -> TransitionRun:
    return TransitionRun(
        checkpoint=str(tiny_checkpoint),
        videos=VideoSelection(width=128, height=128, max_aspect=1.0, fps=8.0, clips=ClipOptions(num_frames=9)),
        encoding=EncodingOptions(TransitionOptions(num_variants=1), modes=("transport",)),
    )


@pytest.fixture(scope="module")
def cache(transition: TransitionRun, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    build_references(transition, data=videos, output=folder)
    return folder


@pytest.fixture
def run(tiny_checkpoint: Path) -> RefinerRun:
    return RefinerRun(
        loop=LOOP,
        checkpoint=str(tiny_checkpoint),
        network=NETWORK,
        flow=SegmentFlowOptions(own_context_share=0.5),
        validation=ValidationOfRefiner(num_samples=1, num_steps=2),
    )


def test_cache_holds_the_usable_clips(cache: Path) -> None:
    samples = LatentCache.open(cache)
    assert [sample.split("@")[0] for sample in (samples[i].name for i in range(3))] == [
        "clip_0.mp4",
        "clip_1.mp4",
        "clip_2.mp4",
    ]
    assert sorted(samples[0].tensors) == ["latents", "prompt_embeds", "reference.0"]
    assert samples[0].tensors["latents"].shape == (48, 3, 8, 8)
    report = json.loads((cache / "data.json").read_text())
    assert report["skipped_by_reason"] == {"unreadable": 1}


def test_cache_of_other_settings_is_refused(transition: TransitionRun, videos: Path, cache: Path) -> None:
    other = replace(transition, encoding=replace(transition.encoding, seed=1))
    with pytest.raises(LatentCacheError, match="setting"):
        build_references(other, data=videos, output=cache)


def test_folder_without_a_usable_video(transition: TransitionRun, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video")
    (tmp_path / "clip.txt").write_text("words")
    with pytest.raises(InvalidInputError, match=r"nothing in .* can be used .*data check"):
        build_references(transition, data=tmp_path, output=tmp_path / "cache")


def test_what_was_trained_generates(run: RefinerRun, cache: Path, tmp_path: Path) -> None:
    steps = []
    checkpoint = train_refiner(run, cache=cache, output=tmp_path, on_step=lambda report: steps.append(report.step))
    assert steps == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("validation/gained_decibels" in line for line in lines)
    frames = generated(checkpoint, num_inference_steps=2)
    assert frames.shape == (9, 64, 64, 3)


def test_distilled_checkpoint_says_how_many_steps(run: RefinerRun, cache: Path, tmp_path: Path) -> None:
    distillation = DistillationOptions(num_student_steps=2, teacher_steps_per_step=2, guidance_scale=2.0)
    distilled = DistillationRun(LOOP, run.checkpoint, 1, NETWORK, distillation, run.validation)
    checkpoint = distill_refiner(distilled, cache=cache, output=tmp_path)
    pipe = TwoStagePipeline.from_pretrained(checkpoint, device="cpu")
    assert (pipe.defaults.num_inference_steps, pipe.defaults.guidance_scale) == (2, 1.0)
    assert pipe.defaults.refiner == "concat"


def test_stock_weights_are_widened_and_their_lora_merged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The merged network is the one with the adapter, and untrained it is the stock one whatever the reference."""
    root = tmp_path / "stock"
    root.mkdir()
    index = json.loads((tiny_checkpoint / "swifti2v.json").read_text())
    index["stage_two"] = {"source": str(tiny_checkpoint / "stock"), "refiner": "training-free"}
    index["stage_one"]["source"] = str(tiny_checkpoint / "stage_one")
    index["stage_one"]["adapters"] = []
    (root / "swifti2v.json").write_text(json.dumps(index))
    network = load_network(root, replace(NETWORK, frozen_dtype="bfloat16")).eval()
    assert network.config.reference_channels == 48
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {"patch_embedding.weight", "frame_kind_table"} <= trained
    assert all("lora_" in name or name.startswith(("patch_embedding", "frame_kind")) for name in trained)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_network(network, tmp_path / "saved")
    plain = StageTwoTransformer.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert set(plain.state_dict()) == set(plain_state(network))
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 96, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad():
        with_adapter = network.float()(**inputs).sample
        merged = plain.float()(**inputs).sample
        network.disable_adapters()
        without = network(**inputs).sample
    assert float((with_adapter - merged).abs().mean()) < 0.05 * float((with_adapter - without).abs().mean())


def test_every_weight_is_trained_without_a_rank(tiny_checkpoint: Path) -> None:
    network = load_network(tiny_checkpoint, NetworkOptions())
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in network.parameters())


def test_validation_of_a_perfect_reference(cache: Path, tiny_checkpoint: Path) -> None:
    """A network whose output is zero velocity from pure noise loses to the reference, and the numbers say so."""
    samples = LatentCache.open(cache)
    network = load_network(tiny_checkpoint, NetworkOptions())
    with torch.no_grad():
        network.proj_out.weight.zero_()
        network.proj_out.bias.zero_()
    options = ValidationOfRefiner(num_samples=1, num_steps=3)
    numbers = RefinerValidation(network, samples=samples, indices=[0], options=options)(0)
    tensors = samples[0].tensors
    expected = (tensors["reference.0"].float() - tensors["latents"].float())[:, 1:].square().mean()
    assert numbers["reference_error"] == pytest.approx(float(expected))
    # Zero velocity leaves the noise as it was: its variance and the truth's add up.
    noise_and_truth = 1 + float(tensors["latents"].float()[:, 1:].square().mean())
    assert numbers["refined_error"] == pytest.approx(noise_and_truth, rel=0.1)


def test_what_is_held_back_is_not_trained_on(cache: Path) -> None:
    samples = LatentCache.open(cache)
    held = HeldOut(samples, 1)
    (bucket,) = samples.buckets
    assert held.indices == (2,)
    assert held.buckets == {bucket: (0, 1)}
    assert RefinerValidation(torch.nn.Module(), samples=samples, indices=(), options=ValidationOfRefiner())(1) == {}
    with pytest.raises(ConfigurationError, match="hold back fewer than 3"):
        HeldOut(samples, 3)


def test_bad_options_and_missing_checkpoints(run: RefinerRun, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="use 0, or a rank and targets"):
        NetworkOptions(lora_rank=4, lora_targets=())
    with pytest.raises(CheckpointError):
        train_refiner(replace(run, checkpoint=str(tmp_path / "none")), cache=cache, output=tmp_path)
    with pytest.raises(LatentCacheError):
        train_refiner(run, cache=tmp_path / "no_cache", output=tmp_path)


def generated(checkpoint: Path, **options: Any) -> torch.Tensor:
    pipe = TwoStagePipeline.from_pretrained(checkpoint, device="cpu")
    image = PIL.Image.fromarray(np.full((64, 64, 3), 90, dtype=np.uint8))
    return pipe(image, "words", options=GenerationOptions(size=Size(64, 64), num_frames=9, **options)).frames


def test_windows_that_cannot_be_shared_are_refused(
    run: RefinerRun, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is spread: a frame of 8x8 latents has 16 tokens, which three processes cannot divide."""
    three = Processes(count=3, context=3)
    monkeypatch.setattr(refiner_run, "joined_processes", lambda _context_parallel: nullcontext(three))
    with pytest.raises(ConfigurationError, match="has 16 tokens, which context_parallel 3 does not divide"):
        train_refiner(run, cache=cache, output=tmp_path)
    detailed = SimpleNamespace(local_detail=torch.nn.Identity())
    monkeypatch.setattr(refiner_run, "load_network", lambda *_arguments: detailed)
    with pytest.raises(ConfigurationError, match="local_detail cannot be trained with context_parallel"):
        train_refiner(run, cache=cache, output=tmp_path)
