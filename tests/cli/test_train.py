"""`swifti2v train` under torchrun: one of the processes speaks, and says what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.training.low_res import run as low_res
from swifti2v.training.refiner import run as refiner

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm"}


@dataclass
class Cache:
    """Stands for what a build returns."""

    num_missing: int
    skipped: tuple[str, ...] = ("one",)

    def __len__(self) -> int:
        return 5


class Build:
    """Stands for a build, and keeps what it was given."""

    def __init__(self, num_missing: int = 0) -> None:
        self.num_missing = num_missing
        self.run: Any = None
        self.has_bars = False

    def __call__(self, run: Any, **given: Any) -> Cache:
        self.run, self.has_bars = run, given["on_video"] is not None and given["on_clip"] is not None
        return Cache(self.num_missing)


def encode(tmp_path: Path, *arguments: str, command: str = "low-res-cache", **environment: str) -> Result:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("checkpoint: mini")
    given = ["train", command, str(recipe), "--data", str(tmp_path), "--output", "CACHE", *arguments]
    return CliRunner().invoke(app, given, env=environment)


@pytest.mark.parametrize(
    ("launch", "speaks"),
    [
        ({}, True),
        ({"RANK": "1"}, True),  # of something else: without torchrun there is one process
        (TORCHRUN | {"RANK": "0"}, True),
        (TORCHRUN | {"RANK": "1"}, False),
    ],
)
def test_one_process_draws_bars_and_prints_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, str], speaks: bool
) -> None:
    build = Build()
    monkeypatch.setattr(low_res, "build_low_res_cache", build)
    result = encode(tmp_path, **launch, **TERMINAL)
    assert result.exit_code == 0, (result.output, result.exception)
    assert build.has_bars == speaks
    assert result.stdout == ("5 clips in CACHE, 1 skipped\n" if speaks else "")


def test_an_unfinished_cache_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_res, "build_low_res_cache", Build(num_missing=3))
    assert encode(tmp_path).stdout == (
        "5 clips in CACHE, 1 skipped, 3 still missing: other processes make them; if none is left, run this again\n"
    )


def test_references_are_made_with_the_checkpoint_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build()
    monkeypatch.setattr(refiner, "build_references", build)
    assert encode(tmp_path, command="transition").exit_code == 0
    assert build.run.checkpoint == "mini"
    assert encode(tmp_path, "--init", "RUN/checkpoint", command="transition").exit_code == 0
    assert build.run.checkpoint == "RUN/checkpoint"


@pytest.mark.parametrize(("rank", "words"), [("0", "generate IMAGE --model RUN/checkpoint\n"), ("1", "")])
def test_one_process_tells_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, words: str
) -> None:
    steps: list[Any] = []

    def train(_run: Any, *, output: Path, on_step: Any, **_: Any) -> Path:
        steps.append(on_step)
        return output / "checkpoint"

    monkeypatch.setattr(refiner, "train_refiner", train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loop: {num_steps: 1}")
    given = ["train", "stage-two", str(recipe), "--cache", str(tmp_path), "--output", "RUN"]
    result = CliRunner().invoke(app, given, env=TORCHRUN | TERMINAL | {"RANK": rank})
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.endswith(words)
    assert bool(result.stdout) == bool(words) == (steps[0] is not None)
