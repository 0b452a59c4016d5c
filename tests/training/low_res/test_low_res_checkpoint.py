"""A trained Low-Res LoRA in use: the checkpoint that the run leaves behind, by the weights and by the commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.data.clips import ClipRequest
from swifti2v.data.latent_cache import LatentCache, build_cache
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.media.video_writer import VideoWriter
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.training.low_res.lora import LoraOptions
from swifti2v.training.low_res.run import LowResLoraRun, open_low_res_encoder, train_low_res_lora
from swifti2v.wan.checkpoint_index import AdapterEntry, read_index
from swifti2v.wan.checkpoints import load_stage_one_pipeline, resolve

if TYPE_CHECKING:
    from pathlib import Path

SIZE, FRAMES, FPS = Size(64, 32), 9, 8.0
RANK, ALPHA = 2, 6.0
COMPONENTS = {"high": "transformer", "low": "transformer_2"}


@pytest.fixture(scope="module")
def cache(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Two clips of random pictures."""
    folder = tmp_path_factory.mktemp("clips")
    requests = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 255, (FRAMES, 4, 8, 3), dtype=np.uint8)
        with VideoWriter(folder / f"{seed}.mp4", size=SIZE, fps=FPS) as writer:
            writer.write(torch.from_numpy(pixels.repeat(8, axis=1).repeat(8, axis=2)))
        requests.append(ClipRequest(f"{seed}@0", folder / f"{seed}.mp4", "blocks", 0, FRAMES, FPS, SIZE))
    encoder, description = open_low_res_encoder(tiny_checkpoint)
    return build_cache(requests, folder / "cache", encode=encoder, description=description)


def recipe(checkpoint: Path, **changes: Any) -> LowResLoraRun:
    loop = LoopOptions(num_steps=3, learning_rate=0.05, warmup_steps=1, checkpoint_every=3, log_every=1, bfloat16=False)
    run = LowResLoraRun(loop, str(checkpoint), samples_per_step=2, lora=LoraOptions(rank=RANK, alpha=ALPHA))
    return replace(run, **changes)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short training of both experts."""
    return train_low_res_lora(recipe(tiny_checkpoint), cache=cache, output=tmp_path_factory.mktemp("run"))


def stage_one_weights(checkpoint: Path, expert: str) -> dict[str, torch.Tensor]:
    pipeline = load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32)
    return getattr(pipeline, COMPONENTS[expert]).state_dict()


def few_step_update(tiny_checkpoint: Path, expert: str) -> torch.Tensor:
    """What the fixture's few-step LoRA adds to the query of its one layer: no alpha, so only the index's scale."""
    file = load_file(tiny_checkpoint / "adapters" / f"{expert}.safetensors")
    part = "diffusion_model.blocks.0.self_attn.q.lora_"
    return {"high": 0.5, "low": 1.0}[expert] * file[f"{part}up.weight"] @ file[f"{part}down.weight"]


def plain_weights(tiny_checkpoint: Path, expert: str) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint / "stage_one" / COMPONENTS[expert] / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("expert", ["high", "low"])
def test_stage_one_is_its_base_and_what_was_trained_and_the_few_steps(
    trained: Path, tiny_checkpoint: Path, expert: str
) -> None:
    lora = load_file(trained / "adapters" / expert / "pytorch_lora_weights.safetensors")
    base, loaded = plain_weights(tiny_checkpoint, expert), stage_one_weights(trained, expert)
    assert loaded.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        stem = f"transformer.{name.removesuffix('.weight')}"
        expected = weight
        if f"{stem}.lora_A.weight" in lora:
            update = ALPHA / RANK * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
            assert update.abs().max() > 1e-3
            expected, changed = weight + update, changed + 1
        if name == "blocks.0.attn1.to_q.weight":
            expected = expected + few_step_update(tiny_checkpoint, expert)
        torch.testing.assert_close(loaded[name], expected, atol=1e-6, rtol=1e-5)
    assert changed == 10  # four of each attention, two of the feed-forward network
    assert len(lora) == 2 * changed


def test_without_few_steps_only_they_are_left_out(trained: Path, tiny_checkpoint: Path) -> None:
    pipeline = load_stage_one_pipeline(resolve(trained), dtype=torch.float32, roles={"low_res"})
    query = pipeline.transformer.blocks[0].attn1.to_q.weight
    difference = stage_one_weights(trained, "high")["blocks.0.attn1.to_q.weight"] - query
    torch.testing.assert_close(difference, few_step_update(tiny_checkpoint, "high"), atol=1e-5, rtol=1e-5)


def test_the_index_is_the_bases_with_the_new_adapters(trained: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before, index = read_index(tiny_checkpoint / "swifti2v.json"), read_index(trained / "swifti2v.json")
    assert [(entry.role, entry.expert, entry.scale) for entry in index.stage_one.adapters] == [
        ("few_step", "high", 0.5), ("few_step", "low", 1.0), ("low_res", "high", 1.0), ("low_res", "low", 1.0),
    ]  # fmt: skip
    assert index.name == "tiny-trained"
    assert replace(index.stage_one, source="./stage_one", adapters=()) == replace(before.stage_one, adapters=())
    assert replace(index.stage_two, source="./stage_two") == before.stage_two
    shutil.copytree(trained, tmp_path / "elsewhere")  # on the machine that has its base
    moved = resolve(tmp_path / "elsewhere")
    assert moved.stage_one == (tiny_checkpoint / "stage_one").resolve()
    assert [path.is_relative_to(tmp_path) for path in moved.adapters] == [False, False, True, True]


def test_an_expert_alone_keeps_what_the_other_had(tiny_checkpoint: Path, cache: LatentCache, tmp_path: Path) -> None:
    checkpoint = train_low_res_lora(recipe(tiny_checkpoint, experts=("low",)), cache=cache, output=tmp_path)
    adapters = str((tiny_checkpoint / "adapters").resolve())
    assert read_index(checkpoint / "swifti2v.json").stage_one.adapters[2:] == (
        AdapterEntry(adapters, "small.safetensors", expert="high", role="low_res"),
        AdapterEntry("./adapters/low", "pytorch_lora_weights.safetensors", expert="low", role="low_res"),
    )
    resolve(checkpoint)
    again = recipe(checkpoint, experts=("high",))  # a training that starts from another's checkpoint
    both = train_low_res_lora(again, cache=cache, output=tmp_path / "second")
    index = read_index(both / "swifti2v.json")
    assert index.name == "tiny-trained"
    assert [(entry.role, entry.expert) for entry in index.stage_one.adapters] == [
        ("few_step", "high"), ("few_step", "low"), ("low_res", "low"), ("low_res", "high"),
    ]  # fmt: skip
    resolve(both)


def test_the_checkpoint_can_be_used_before_the_second_expert_is_done(
    tiny_checkpoint: Path, cache: LatentCache, tmp_path: Path
) -> None:
    def stop(expert: str, _report: object) -> None:
        if expert == "low":
            roles = [(entry.role, entry.expert) for entry in resolve(tmp_path / "checkpoint").index.stage_one.adapters]
            assert roles[2:] == [("low_res", "low"), ("low_res", "high")]  # the base's for one, the new for the other
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_low_res_lora(recipe(tiny_checkpoint), cache=cache, output=tmp_path, on_step=stop)


@pytest.mark.parametrize("command", ["preview", "generate"])
def test_the_commands_take_the_folder(trained: Path, tmp_path: Path, command: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    output = tmp_path / "out.mp4"
    given = [command, str(tmp_path / "photo.png"), "--model", str(trained), "--output", str(output), "--prompt", "a"]
    steps = () if command == "preview" else ("--steps", "1")
    result = CliRunner().invoke(app, [*given, "--frames", str(FRAMES), *steps])
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list(VideoReader(output).frames())) == FRAMES


def test_references_are_made_with_the_trained_stage_one(trained: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Stage-transition by its command; with the LoRA the references are others, the clip's own latents the same."""
    (tmp_path / "videos").mkdir()
    pixels = np.random.default_rng(5).integers(0, 255, (1, 8, 16, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    with VideoWriter(tmp_path / "videos" / "0.mp4", size=Size(128, 128), fps=FPS) as writer:
        writer.write(np.concatenate([pixels[:, :, 4 * t : 4 * t + 128] for t in range(FRAMES)]))
    (tmp_path / "videos" / "0.txt").write_text("blocks slide")
    videos = {"width": 128, "height": 128, "max_aspect": 1.0, "fps": FPS, "clips": {"num_frames": FRAMES}}
    encoding = {"modes": ["replace"], "transition": {"num_variants": 1}}
    samples = []
    ways = (("a", tiny_checkpoint, trained), ("b", trained, None), ("c", tiny_checkpoint, None))
    for name, checkpoint, initial in ways:
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps({"checkpoint": str(checkpoint), "videos": videos, "encoding": encoding}))
        given = ["train", "transition", str(file), "--data", str(tmp_path / "videos"), "-o", str(tmp_path / name)]
        result = CliRunner().invoke(app, [*given, *(() if initial is None else ("--init", str(initial)))])
        assert result.exit_code == 0, (result.output, result.exception)
        samples.append(LatentCache.open(tmp_path / name)[0].tensors)
    by_option, by_recipe, without = samples
    for name, tensor in by_recipe.items():
        assert torch.equal(by_option[name], tensor)
        assert torch.equal(without[name], tensor) == (not name.startswith("reference"))
