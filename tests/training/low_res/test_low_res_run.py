"""The Low-Res LoRA from videos to files that the pipeline loads, on a tiny checkpoint; and its recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.config import load_yaml, to_mapping
from swifti2v.data.clips import Clip, ClipRequest
from swifti2v.data.latent_cache import LatentCache, build_cache
from swifti2v.errors import ConfigurationError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.low_res.lora import LoraOptions
from swifti2v.training.low_res.run import LowResLoraRun, open_low_res_encoder, train_low_res_lora
from swifti2v.wan.lora import fuse, load_adapter, read_adapter_file

RECIPE = Path(__file__).parents[3] / "recipes" / "wan2.2" / "stage_one_low_res_lora.yaml"
SIZE, FRAMES, FPS = Size(64, 32), 9, 8.0


def pictures(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 255, (1, 4, 8, 3), dtype=np.uint8)
    still = np.kron(start, np.ones((1, 8, 8, 1), np.uint8))
    return np.concatenate([np.roll(still, shift, axis=2) for shift in range(FRAMES)])


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory) -> LatentCache:
    folder = tmp_path_factory.mktemp("clips")
    requests = []
    for seed in range(3):
        path = folder / f"{seed}.mp4"
        with VideoWriter(path, size=SIZE, fps=FPS) as writer:
            writer.write(torch.from_numpy(pictures(seed)))
        requests.append(ClipRequest(f"{seed}@0", path, f"clip {seed}", 0, FRAMES, FPS, SIZE))
    encoder, description = open_low_res_encoder(tiny_checkpoint)
    build_cache(requests, folder / "cache", encode=encoder, description=description)
    return LatentCache.open(folder / "cache", description=description)


@pytest.fixture
def run(tiny_checkpoint) -> LowResLoraRun:
    loop = LoopOptions(num_steps=2, warmup_steps=1, checkpoint_every=2, log_every=1, bfloat16=False)
    return LowResLoraRun(loop, checkpoint=str(tiny_checkpoint), samples_per_step=2, lora=LoraOptions(rank=2, alpha=6.0))


def test_tensors_are_those_that_the_pipeline_samples_with(tiny_checkpoint) -> None:
    encoder, _ = open_low_res_encoder(tiny_checkpoint)
    frames = pictures(0)
    tensors = encoder(Clip(frames, FPS, "a clip", "0@0", "64x32x9"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "latents": (16, 3, 4, 8),
        "condition": (20, 3, 4, 8),
        "prompt_embeds": (16, 32),
    }
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_checkpoint / "stage_one")
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda _net, _args, named: seen.append(named), with_kwargs=True)
    pipeline(
        PIL.Image.fromarray(frames[0]), "a clip", height=32, width=64, num_frames=FRAMES, num_inference_steps=1,
        guidance_scale=1.0, max_sequence_length=16, output_type="latent",
    )  # fmt: skip
    condition, prompt = seen[0]["hidden_states"][0, 16:], seen[0]["encoder_hidden_states"][0]
    torch.testing.assert_close(tensors["condition"].float(), condition, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tensors["prompt_embeds"].float(), prompt, atol=2e-3, rtol=2e-3)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    mode = pipeline.vae.encode(pixels).latent_dist.mode()
    mean, deviation = (
        torch.tensor(pipeline.vae.config[f"latents_{name}"]).view(16, 1, 1, 1) for name in ("mean", "std")
    )
    torch.testing.assert_close(tensors["latents"].float(), (mode[0] - mean) / deviation, atol=2e-3, rtol=2e-3)


def test_from_a_cache_to_files_for_both_experts(run, cache, tmp_path, tiny_checkpoint) -> None:
    reports = []
    train_low_res_lora(
        run, cache=cache, output=tmp_path, on_step=lambda expert, report: reports.append((expert, report))
    )
    assert [(expert, report.step) for expert, report in reports] == [("high", 1), ("high", 2), ("low", 1), ("low", 2)]
    assert {report.numbers["samples"] for _, report in reports} == {2.0}
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_checkpoint / "stage_one")
    files = tmp_path / "checkpoint" / "adapters"
    pipeline.load_lora_weights(files / "high", adapter_name="high")
    pipeline.load_lora_weights(files / "low", adapter_name="low", load_into_transformer_2=True)
    assert pipeline.get_list_adapters() == {"transformer": ["high"], "transformer_2": ["low"]}
    plain = WanImageToVideoPipeline.from_pretrained(tiny_checkpoint / "stage_one")
    for expert, component in (("high", "transformer"), ("low", "transformer_2")):
        network = getattr(plain, component)
        before = network.blocks[0].attn1.to_q.weight.clone()
        fuse(network, load_adapter(read_adapter_file(files / expert / "comfyui_lora.safetensors"), network))
        layer = getattr(pipeline, component).blocks[0].attn1.to_q
        change = layer.get_delta_weight(expert).detach()
        assert change.abs().max() > 0
        torch.testing.assert_close(network.blocks[0].attn1.to_q.weight - before, change, atol=1e-4, rtol=1e-2)


def test_a_folder_of_videos_becomes_a_cache(tiny_checkpoint, tmp_path) -> None:
    """By the command: sizes that Stage I can have, a text file that is no video counted and left out."""
    (tmp_path / "videos").mkdir()
    for seed in range(2):
        with VideoWriter(tmp_path / "videos" / f"{seed}.mp4", size=Size(128, 128), fps=FPS) as writer:
            writer.write(torch.from_numpy(pictures(seed)).repeat(1, 4, 2, 1))
        (tmp_path / "videos" / f"{seed}.txt").write_text("blocks slide")
    (tmp_path / "videos" / "2.mp4").write_text("no video")
    (tmp_path / "videos" / "2.txt").write_text("nothing")
    recipe = tmp_path / "recipe.yaml"
    videos = {"width": 128, "height": 128, "max_aspect": 1.0, "fps": FPS, "clips": {"num_frames": FRAMES}}
    recipe.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "videos": videos}))
    folder = ["--data", str(tmp_path / "videos"), "-o", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, ["train", "low-res-cache", str(recipe), *folder])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 clips in {tmp_path / 'cache'}, 0 skipped\n"
    made = LatentCache.open(tmp_path / "cache")
    assert made[0].tensors["latents"].shape == (16, 3, 16, 16)
    report = json.loads((tmp_path / "cache" / "data.json").read_text())
    assert report["skipped_by_reason"] == {"unreadable": 1}


def test_the_command_trains_both_experts(run, cache, tmp_path, tiny_checkpoint) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = to_mapping(run)
    del values["loop"]["max_seconds"]  # without limit, which JSON cannot say
    recipe.write_text(json.dumps(values))
    given = ["train", "stage-one", str(recipe), "--cache", str(cache.folder), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert all((tmp_path / "run" / expert / "checkpoint.pt").exists() for expert in ("high", "low"))
    assert f"--model {tmp_path / 'run' / 'checkpoint'}\n" in result.output
    assert CliRunner().invoke(app, [*given, "--data", "x"]).exit_code == 2


def test_an_interrupted_run_goes_on_with_the_expert_it_was_at(run, cache, tmp_path) -> None:
    def stop(expert, report) -> None:
        if (expert, report.step) == ("low", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_low_res_lora(run, cache=cache, output=tmp_path, on_step=stop)
    steps = []
    train_low_res_lora(
        run, cache=cache, output=tmp_path, on_step=lambda expert, report: steps.append((expert, report.step))
    )
    assert steps == [("low", 1), ("low", 2)]
    assert [json.loads(line)["step"] for line in (tmp_path / "low" / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_the_same_recipe_makes_the_same_steps_on_any_number_of_devices(run) -> None:
    eight = replace(run, samples_per_step=8, batch_size=2)
    assert [eight.loop_on(count).gradient_accumulation for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigurationError, match="samples_per_step 8 does not divide by 3 processes of batch_size 2"):
        eight.loop_on(3)
    with pytest.raises(ConfigurationError, match="does not divide by 8 processes"):
        eight.loop_on(8)
    with pytest.raises(ConfigurationError, match="leave it out of loop"):
        replace(run, loop=replace(run.loop, gradient_accumulation=2))
    with pytest.raises(ConfigurationError, match="must name high, low or both"):
        replace(run, experts=())


def test_an_unknown_key_of_the_recipe_is_named(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.read_text().replace("rank: 32", "ranks: 32"))
    with pytest.raises(ConfigurationError, match=r"unknown key 'ranks'; did you mean 'rank'"):
        load_yaml(LowResLoraRun, path)
