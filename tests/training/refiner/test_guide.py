"""docs/guides/training.md, run as it is written: its commands, on the embedded model, with recipes cut to two steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.media.video_writer import VideoWriter

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "guides" / "training.md"


def commands() -> list[list[str]]:
    """What stands in the bash blocks of the guide."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def shortened(recipe: str) -> str:
    """Return a recipe whose run takes two steps."""
    for name in ("num_steps", "checkpoint_every", "validate_every", "log_every"):
        recipe = re.sub(rf"^(  {name}): \d+", r"\1: 2", recipe, flags=re.MULTILINE, count=1)
    return recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, three videos with captions, and a photo."""
    (tmp_path / "recipes" / "mini").mkdir(parents=True)
    for recipe in (ROOT / "recipes" / "mini").glob("*.yaml"):
        (tmp_path / "recipes" / "mini" / recipe.name).write_text(shortened(recipe.read_text(encoding="utf-8")))
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


@pytest.mark.slow
def test_the_guide_runs_as_it_is_written(place: Path) -> None:
    assert [command[1:3] for command in commands()] == [
        ["data", "check"],
        ["train", "transition"],
        ["plan", "--train"],
        ["train", "stage-two"],
        ["train", "distill"],
        ["generate", "photo.jpg"],
    ]
    for command in commands():
        assert command[0] == "swifti2v"
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, (command, result.output, result.exception)
    frames = list(VideoReader(place / "video.mp4").frames())
    assert len(frames) == 17
    assert frames[0].shape == (352, 640, 3)
    photo = cv2.cvtColor(cv2.imread(str(place / "photo.jpg")), cv2.COLOR_BGR2RGB)
    assert float(np.square(frames[0].astype(float) - photo).mean()) < 30  # the first frame is the photo


@pytest.mark.parametrize("given", [[], ["--cache", "a", "--data", "b"]])
def test_stage_two_wants_one_source(given: list[str], place: Path) -> None:
    result = CliRunner().invoke(app, ["train", "stage-two", "recipes/mini/refine.yaml", "-o", "run", *given])
    assert result.exit_code == 2
    assert "give --cache" in result.output
