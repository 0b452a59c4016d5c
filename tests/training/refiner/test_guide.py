"""docs/guides/training.md, run as it is written: on the embedded model, and for the full size on a tiny checkpoint.

Recipes are cut to two steps; those of `recipes/wan2.2` also to small clips, and to the precision of a CPU.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.media.video_writer import VideoWriter
from swifti2v.wan.checkpoint_index import read_index

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "guides" / "training.md"
TORCHRUN = ["torchrun", "--nproc-per-node", "8", "-m", "swifti2v.cli.main"]


def commands(program: list[str]) -> list[list[str]]:
    """What stands in the bash blocks of the guide after `program`."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [line[len(program) :] for line in lines if line[: len(program)] == program]


def run(given: list[str]) -> None:
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, (given, result.output, result.exception)


def shortened(recipe: str) -> str:
    """Return a recipe whose run takes two steps."""
    for name in ("num_steps", "checkpoint_every", "validate_every", "log_every"):
        recipe = re.sub(rf"^(  {name}): \d+", r"\1: 2", recipe, flags=re.MULTILINE, count=1)
    return recipe


def tiny(recipe: str, checkpoint: Path) -> str:
    """Return a recipe of the full size for a tiny checkpoint, which keeps the rest of its keys."""
    values = yaml.safe_load(recipe)
    assert values["checkpoint"] == "wan2.2"
    values["checkpoint"] = str(checkpoint)
    if "loop" in values:
        values["loop"] |= {"num_steps": 2, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1, "bfloat16": False}
    if "network" in values:
        values["network"]["frozen_dtype"] = "float32"
    if "validation" in values:
        values["loop"]["validate_every"] = 2
        values["validation"]["num_samples"] = 1
    if "videos" in values:
        width, height = (64, 32) if values["videos"]["width"] == 640 else (128, 64)
        values["videos"] |= {"width": width, "height": height, "max_aspect": 1.0, "clips": {"num_frames": 9}}
    return yaml.safe_dump(values)


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, three videos with captions, and a photo."""
    for model in ("mini", "wan2.2"):
        (tmp_path / "recipes" / model).mkdir(parents=True)
        for recipe in (ROOT / "recipes" / model).glob("*.yaml"):
            text = recipe.read_text(encoding="utf-8")
            changed = shortened(text) if model == "mini" else tiny(text, tiny_checkpoint)
            (tmp_path / "recipes" / model / recipe.name).write_text(changed)
    (tmp_path / "videos").mkdir()
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 255, (12, 24, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (760, 352), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(tmp_path / "videos" / f"{seed}.mp4", size=Size(640, 352), fps=16) as writer:
            writer.write(np.stack([wide[:, 5 * t : 5 * t + 640] for t in range(18)]))
        (tmp_path / "videos" / f"{seed}.txt").write_text("pan right")
    cv2.imwrite(str(tmp_path / "photo.jpg"), wide[:, :640])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_guide_is_run_here() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert sum(len(block.splitlines()) for block in blocks) == len(commands(["swifti2v"])) + len(commands(TORCHRUN))
    assert [command[1] for command in commands(TORCHRUN)] == [
        "low-res-cache", "stage-one", "transition", "stage-two", "distill",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_guide_runs_as_it_is_written(place: Path) -> None:
    given = commands(["swifti2v"])
    assert [command[:2] for command in given] == [
        ["data", "check"],
        ["train", "low-res-cache"],
        ["train", "stage-one"],
        ["train", "transition"],
        ["plan", "--train"],
        ["train", "stage-two"],
        ["train", "distill"],
        ["generate", "photo.jpg"],
    ]
    for command in given:
        run(command)
    frames = list(VideoReader(place / "video.mp4").frames())
    assert len(frames) == 17
    assert frames[0].shape == (352, 640, 3)
    photo = cv2.cvtColor(cv2.imread(str(place / "photo.jpg")), cv2.COLOR_BGR2RGB)
    assert float(np.square(frames[0].astype(float) - photo).mean()) < 30  # the first frame is the photo


@pytest.mark.slow
def test_the_full_size_goes_from_videos_to_a_checkpoint_with_all_that_was_trained(place: Path) -> None:
    """Each command finds what those before it made; here in one process, which is what each of eight does."""
    for command in commands(TORCHRUN):
        run(command)
    index = read_index(place / "runs" / "few_steps" / "checkpoint" / "swifti2v.json")
    low_res = (place / "runs" / "low_res" / "checkpoint" / "adapters").resolve()
    found = [(entry.role, entry.expert, entry.source) for entry in index.stage_one.adapters if entry.role == "low_res"]
    assert found == [("low_res", expert, str(low_res / expert)) for expert in ("high", "low")]
    assert (index.stage_two.refiner, index.stage_two.num_inference_steps) == ("concat", 4)
    model = str(place / "runs" / "few_steps" / "checkpoint")
    run(["generate", "photo.jpg", "--model", model, "--size", "64x64", "--frames", "9", "--output", "video.mp4"])
    assert len(list(VideoReader(place / "video.mp4").frames())) == 9


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("low-res-cache", "low_res_cache"),
        ("stage-one", "stage_one_low_res_lora"),
        ("transition", "transition"),
        ("stage-two", "stage_two"),
        ("distill", "distill"),
    ],
)
def test_the_costs_of_the_full_size_are_those_of_the_recipes(command: str, recipe: str) -> None:
    (row,) = re.findall(rf"^\| `{command}` \| ([\d.]+)(.*)\|(.*)\|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    header = (ROOT / "recipes" / "wan2.2" / f"{recipe}.yaml").read_text(encoding="utf-8")
    hours = row[0]
    assert f"{hours} GPU-hours" in header or f"{hours} for both" in header
    if "a clip" in row[2]:
        assert f"{row[2].strip().replace(' a clip', ' of disk a clip')}" in header


@pytest.mark.parametrize("given", [[], ["--cache", "a", "--data", "b"]])
def test_stage_two_wants_one_source(given: list[str], place: Path) -> None:
    result = CliRunner().invoke(app, ["train", "stage-two", "recipes/mini/refine.yaml", "-o", "run", *given])
    assert result.exit_code == 2
    assert "give --cache" in result.output
