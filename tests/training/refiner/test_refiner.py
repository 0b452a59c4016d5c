"""From a folder of videos to a checkpoint that generates: transition, Stage II, distillation, on tiny networks."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.data.clips import ClipOptions
from swifti2v.data.latent_cache import LatentCache, write_index
from swifti2v.data.shards import FreshSample, write_shard
from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError, LatentCacheError
from swifti2v.geometry import Size
from swifti2v.runner.loading import settings_of
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import sample_segments
from swifti2v.segments import plan_segments
from swifti2v.training.engine.distributed import Processes
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.refiner import run as refiner_run
from swifti2v.training.refiner import validation
from swifti2v.training.refiner.distillation import DistillationOptions
from swifti2v.training.refiner.distribution_matching import DistributionMatchingOptions
from swifti2v.training.refiner.encoding import EncodingOptions, read_empty_prompt
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
from swifti2v.wan.transformer import StageTwoTransformer
from tests.training.sliding_clips import write_clips

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
    write_clips(folder, 3)
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
        "0.mp4",
        "1.mp4",
        "2.mp4",
    ]
    assert sorted(samples[0].tensors) == ["latents", "prompt_embeds", "reference.0"]
    assert samples[0].tensors["latents"].shape == (48, 3, 8, 8)
    report = json.loads((cache / "data.json").read_text())
    assert report["skipped_by_reason"] == {"unreadable": 1}


def test_cache_of_other_settings_is_refused(transition: TransitionRun, videos: Path, cache: Path) -> None:
    other = replace(transition, encoding=replace(transition.encoding, seed=1))
    with pytest.raises(LatentCacheError, match="seed"):
        build_references(other, data=videos, output=cache)


def test_no_prompt_is_what_a_pipeline_says_it_is(
    transition: TransitionRun, videos: Path, cache: Path, run: RefinerRun, tmp_path: Path
) -> None:
    """The cache holds it once; an older cache gets it without its clips being encoded again."""
    pipe = TwoStagePipeline.from_pretrained(run.checkpoint, device="cpu")
    embeds, _ = pipe.parts.stage_one.pipeline.encode_prompt(
        "", do_classifier_free_guidance=False, max_sequence_length=pipe.parts.stage_one.max_sequence_length
    )
    torch.testing.assert_close(read_empty_prompt(cache), embeds[0].half())
    older = shutil.copytree(cache, tmp_path / "older")
    (older / "empty_prompt.safetensors").unlink()
    with pytest.raises(LatentCacheError, match="lacks the empty prompt; run train transition on it again"):
        train_refiner(run, cache=older, output=tmp_path / "run")
    shards = {path: path.stat().st_mtime_ns for path in (older / "shards").iterdir()}
    build_references(transition, data=videos, output=older)
    torch.testing.assert_close(read_empty_prompt(older), embeds[0].half())
    assert {path: path.stat().st_mtime_ns for path in (older / "shards").iterdir()} == shards
    (older / "empty_prompt.safetensors").write_bytes(b"torn")
    with pytest.raises(LatentCacheError, match="is damaged; run train transition"):
        read_empty_prompt(older)


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
    frames = generated(checkpoint)
    assert frames.shape == (9, 64, 64, 3)


def test_a_checkpoint_runs_as_it_was_judged(run: RefinerRun, cache: Path, tmp_path: Path, monkeypatch) -> None:
    """What validation hands to the sampler is what a pipeline finds in the index, and none of it is the base's."""
    judged: list[tuple[Any, Any]] = []

    def noted(frames: Any, plan: Any, *, sigmas: Any, **options: Any) -> Any:
        judged.append((plan, sigmas))
        return sample_segments(frames, plan, sigmas=sigmas, **options)

    monkeypatch.setattr(validation, "sample_segments", noted)
    flow = replace(run.flow, flow_shift=3.0)
    how = ValidationOfRefiner(num_samples=1, num_steps=3, flow_shift=3.0, segment_size=1, neighbors_before=0)
    checkpoint = train_refiner(replace(run, flow=flow, validation=how), cache=cache, output=tmp_path)
    (plan, sigmas), *_ = judged
    found = TwoStagePipeline.from_pretrained(checkpoint, device="cpu").defaults
    base = settings_of(run.checkpoint)
    assert found.num_inference_steps == len(sigmas) - 1 != base.num_inference_steps
    assert shifted_sigmas(found.num_inference_steps, shift=found.flow_shift) == sigmas
    assert plan == plan_segments(
        plan[-1].targets.stop,
        segment_size=found.segment_size,
        neighbors_before=found.neighbors_before,
        neighbors_after=found.neighbors_after,
    )
    assert found.segment_size != base.segment_size
    assert (found.refiner, found.sigma_start, found.guidance_scale, found.positions) == ("concat", 1, 1, "absolute")


def test_validation_has_the_time_shift_of_training(run: RefinerRun) -> None:
    other = ValidationOfRefiner(flow_shift=3.0)
    with pytest.raises(ConfigurationError, match=r"flow_shift is 5.0 in training and 3.0 in validation; set both"):
        replace(run, validation=other)
    with pytest.raises(ConfigurationError, match=r"flow_shift is 5.0 in training and 3.0 in validation; set both"):
        DistillationRun(LOOP, validation=other)


@pytest.mark.parametrize(
    "distillation",
    [
        DistillationOptions(2, guidance_scale=2.0, teacher_steps_per_step=2),
        DistributionMatchingOptions(2, guidance_scale=2.0, critic_steps_per_step=2, critic_learning_rate=1e-3),
    ],
)
def test_distilled_checkpoint_says_how_many_steps(
    run: RefinerRun, cache: Path, tmp_path: Path, distillation: DistillationOptions | DistributionMatchingOptions
) -> None:
    distilled = DistillationRun(LOOP, run.checkpoint, 1, NETWORK, distillation, run.validation, student=run.checkpoint)
    checkpoint = distill_refiner(distilled, cache=cache, output=tmp_path)
    assert ("critic" in torch.load(tmp_path / "checkpoint.pt")) is isinstance(distillation, DistributionMatchingOptions)
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


def without_velocity(checkpoint: Path) -> StageTwoTransformer:
    network = load_network(checkpoint, NetworkOptions())
    with torch.no_grad():
        network.proj_out.weight.zero_()
        network.proj_out.bias.zero_()
    return network


def test_validation_of_a_network_that_leaves_the_noise(cache: Path, tiny_checkpoint: Path) -> None:
    """A network whose output is zero velocity from pure noise loses to the reference, and the numbers say so."""
    samples, network = LatentCache.open(cache), without_velocity(tiny_checkpoint)
    options = ValidationOfRefiner(num_samples=1, num_steps=3)
    numbers = RefinerValidation(network, samples=samples, indices=[0], options=options, processes=Processes())(0)
    tensors = samples[0].tensors
    expected = (tensors["reference.0"].float() - tensors["latents"].float())[:, 1:].square().mean()
    assert numbers["reference_error"] == pytest.approx(float(expected))
    # Zero velocity leaves the noise as it was: its variance and the truth's add up.
    noise_and_truth = 1 + float(tensors["latents"].float()[:, 1:].square().mean())
    assert numbers["refined_error"] == pytest.approx(noise_and_truth, rel=0.1)
    assert numbers["gained_decibels"] == pytest.approx(10 * np.log10(float(expected) / numbers["refined_error"]))


def test_processes_divide_the_clips_and_run_as_many_forwards(cache: Path, tiny_checkpoint: Path) -> None:
    """Three clips on two processes, the second of which has one to repeat; the numbers are those of one process."""
    samples, network = LatentCache.open(cache), without_velocity(tiny_checkpoint)
    options = ValidationOfRefiner(num_samples=3, num_steps=1)
    alone = RefinerValidation(network, samples=samples, indices=[0, 1, 2], options=options, processes=Processes())(0)
    forwards = [0, 0]
    found: list[list[Any]] = []

    class Recorded(Processes):
        """Two processes, one after the other: each sees what those before it have brought."""

        def gather(self, value: Any) -> list[Any]:
            found.append(value)
            return found

    for rank in range(2):
        own = RefinerValidation(
            network, samples=samples, indices=[0, 1, 2], options=options, processes=Recorded(rank, 2)
        )
        hook = network.register_forward_hook(lambda *_, rank=rank: forwards.__setitem__(rank, forwards[rank] + 1))
        together = own(0)
        hook.remove()
    assert forwards[0] == forwards[1] > 0
    assert [len(errors) for errors in found] == [2, 1]
    assert together == pytest.approx(alone)


def test_what_is_held_back_is_not_trained_on(cache: Path) -> None:
    samples = LatentCache.open(cache)
    held = HeldOut(samples, 1)
    (bucket,) = samples.buckets
    assert len(held.indices) == 1
    assert sorted((*held.indices, *held.buckets[bucket])) == [0, 1, 2]
    nothing = ValidationOfRefiner()
    none = RefinerValidation(torch.nn.Module(), samples=samples, indices=(), options=nothing, processes=Processes())
    assert none(1) == {}
    assert HeldOut(samples, 0).buckets == samples.buckets
    with pytest.raises(ConfigurationError, match="3 videos; hold back fewer than 3"):
        HeldOut(samples, 3)


def test_whole_videos_are_held_back_in_no_order_of_names(tmp_path: Path) -> None:
    """Clips of one video overlap: none may be trained on while another is judged."""
    names = [f"{video:02d}.mp4@{first}" for video in range(12) for first in (0, 3, 7)]
    (tmp_path / "shards").mkdir()
    fresh = [FreshSample(name, "words", "32x32x5", name, {"latents": torch.zeros(1, 2, 1, 1)}) for name in names]
    write_shard(tmp_path, fresh, description={}, writer="test")
    write_index(tmp_path, {name: name for name in names}, description={}, writer="test")
    samples = LatentCache.open(tmp_path)
    held = HeldOut(samples, 4)
    judged = [samples[index].name.split("@")[0] for index in held.indices]
    trained = {samples[index].name.split("@")[0] for indices in held.buckets.values() for index in indices}
    assert len(set(judged)) == len(judged) == 4
    assert len(trained) == 8
    assert not trained & set(judged)
    assert sorted(judged) not in (sorted({*judged, *trained})[:4], sorted({*judged, *trained})[-4:])
    assert {*HeldOut(samples, 2).indices} < {*held.indices}  # whoever asks for more keeps those


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
    return pipe(image, "words", **{"size": Size(64, 64), "num_frames": 9, **options}).frames


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
