"""Bad data, caches, disks and recipes given to `swifti2v train`: counted skips, or one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.data.latent_cache import LatentCache
from swifti2v.media import atomic_files
from swifti2v.mini.recipes import StageOneRun, StageTwoRun
from swifti2v.training.light.run import LightRun
from swifti2v.training.low_res.run import LowResCacheRun, LowResLoraRun
from swifti2v.training.refiner import network
from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun
from tests.training.sliding_clips import write_clips
from tests.training.test_recipes import KINDS

if TYPE_CHECKING:
    from click.testing import Result

RECIPES = Path(__file__).parents[2] / "recipes"
COMMANDS = {
    LightRun: ("light", "--data"),
    StageOneRun: ("stage-one", "--data"),
    StageTwoRun: ("stage-two", "--data"),
    LowResCacheRun: ("low-res-cache", "--data"),
    LowResLoraRun: ("stage-one", "--cache"),
    TransitionRun: ("transition", "--data"),
    RefinerRun: ("stage-two", "--cache"),
    DistillationRun: ("distill", "--cache"),
}


def train(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    *progress, line = result.stderr.splitlines()
    assert all("% (" in each for each in progress)
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips, one that is no video, one whose end is missing, and one without a caption."""
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder, 4)
    (folder / "2.mp4").write_bytes((folder / "2.mp4").read_bytes()[:2000])
    (folder / "3.txt").write_text(" \n")
    (folder / "4.mp4").write_text("no video")
    (folder / "4.txt").write_text("words\n")
    return folder


@pytest.fixture(scope="module")
def transition(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = {"width": 128, "height": 128, "max_aspect": 1.0, "fps": 8.0, "clips": {"num_frames": 9}}
    encoding = {"modes": ["replace"], "unchanged": True, "transition": None}
    path = tmp_path_factory.mktemp("recipe") / "transition.yaml"
    path.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "videos": clips, "encoding": encoding}))
    return path


@pytest.fixture(scope="module")
def cache(transition: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    result = train("transition", transition, "--data", videos, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_videos_that_cannot_be_used_are_counted(cache: Path) -> None:
    report = json.loads((cache / "data.json").read_text())
    assert report["skipped_by_reason"]["empty caption"] == 1
    assert sum(report["skipped_by_reason"].values()) == 3
    samples = LatentCache.open(cache)
    assert sorted(samples[index].name.split("@")[0] for index in range(len(samples))) == ["0.mp4", "1.mp4"]


def test_a_wrong_column(transition: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(f"clip,words\n{videos / '0.mp4'},blobs\n")
    refused(train("transition", transition, "--data", tmp_path, "-o", tmp_path / "cache"), "clip", "words")


def test_a_stale_cache(transition: Path, videos: Path, cache: Path, tmp_path: Path) -> None:
    changed = json.loads(transition.read_text())
    changed["encoding"]["flow_scale"] = 0.25
    (tmp_path / "recipe.yaml").write_text(json.dumps(changed))
    refused(train("transition", tmp_path / "recipe.yaml", "--data", videos, "-o", cache), "flow_scale", "0.25")


def test_no_cache(tmp_path: Path) -> None:
    recipe = RECIPES / "mini" / "refine.yaml"
    refused(train("stage-two", recipe, "--cache", tmp_path / "none", "-o", tmp_path / "run"), "none")


def no_space(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_encoding(
    transition: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files.os, "fsync", no_space)
    result = train("transition", transition, "--data", videos, "-o", tmp_path)
    refused(result, "No space left on device", "free some space and run again")


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_while_training(
    tiny_checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The weights do not fit beside the checkpoint; with room again, the same command goes on."""
    recipe = tmp_path / "recipe.yaml"
    loop = {"num_steps": 1, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1, "bfloat16": False}
    flow = {"own_context_share": 0.0}
    recipe.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "loop": loop, "flow": flow}))

    def full(*_arguments: object, **_options: object) -> None:
        raise error("No space left on device (os error 28)")

    monkeypatch.setattr(network, "save_file", full)
    given = ("stage-two", recipe, "--cache", cache, "-o", tmp_path / "run")
    refused(train(*given), "No space left on device", "make room and start again")
    monkeypatch.undo()
    assert train(*given).exit_code == 0


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_key_is_named_before_anything_is_read(tmp_path: Path, name: str) -> None:
    command, source = COMMANDS[KINDS[name]]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / f"{name}.yaml").read_text(encoding="utf-8") + "\nlearning_speed: 1\n")
    refused(train(command, recipe, source, tmp_path / "none", "-o", tmp_path / "run"), "unknown key 'learning_speed'")
