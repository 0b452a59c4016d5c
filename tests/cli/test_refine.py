"""`swifti2v refine` from the command line to the file: one video, a list, and what cannot be refined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import EXIT_ERROR, app
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from click.testing import Result

EXAMPLE = next((Path(__file__).parents[2] / "examples").glob("*.jpg"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo, a video of a camera that pans over it, another photo, and files that are neither."""
    folder = tmp_path_factory.mktemp("refine")
    picture = PIL.Image.open(EXAMPLE).convert("RGB").resize((320, 180), PIL.Image.Resampling.LANCZOS)
    picture.save(folder / "photo.png")
    pixels = np.asarray(picture)
    small = [cv2.resize(pixels[8:168, 8 + t : 296 + t], (72, 40), interpolation=cv2.INTER_AREA) for t in range(6)]
    with VideoWriter(folder / "motion.mp4", size=Size(72, 40), fps=12) as writer:
        writer.write(np.stack(small))
    noise = np.random.default_rng(0).integers(0, 256, (36, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((320, 180), PIL.Image.Resampling.BICUBIC).save(folder / "other.png")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.csv").touch()
    (folder / "columns.csv").write_text("video,photo\na,b\n")
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["refine", *map(str, arguments), "--device", "cpu"])


def test_one_video(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "refined.mp4"
    result = run(folder / "motion.mp4", "--image", folder / "photo.png", "-o", output, "--size", "192x96", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["size"], summary["num_frames"], summary["fps"]) == ("192x96", 6, 12.0)
    reader = VideoReader(output)
    assert (reader.info.size, reader.info.fps, reader.count_frames()) == (Size(192, 96), 12, 6)


def test_a_list_goes_on_after_a_bad_line_and_skips_what_is_there(folder: Path) -> None:
    (folder / "list.csv").write_text(
        "motion,image,output\nmotion.mp4,photo.png,one.mp4\nmotion.mp4,other.png,two.mp4\nmotion.mp4,photo.png,three.mp4\n"
    )
    arguments = (folder / "list.csv", "--size", "96x64", "--frames", "2")
    result = run(*arguments)
    assert result.exit_code == EXIT_ERROR
    assert (folder / "one.mp4").exists()
    assert not (folder / "two.mp4").exists()
    written = (folder / "three.mp4").stat().st_mtime_ns
    assert run(*arguments).exit_code == EXIT_ERROR
    assert (folder / "three.mp4").stat().st_mtime_ns == written
    assert VideoReader(folder / "one.mp4").count_frames() == 2


@pytest.mark.parametrize(
    ("motion", "image", "options"),
    [
        ("missing.mp4", "photo.png", ()),
        ("empty.mp4", "photo.png", ()),
        ("text.mp4", "photo.png", ()),
        ("", "photo.png", ()),  # the folder itself
        ("motion.mp4", "missing.png", ()),
        ("motion.mp4", "text.mp4", ()),
        ("motion.mp4", "other.png", ()),  # does not belong to the video
        ("motion.mp4", "photo.png", ("--size", "32x32")),  # smaller than the motion
        ("motion.mp4", "photo.png", ("--size", "wide")),
        ("motion.mp4", "photo.png", ("--device", "nowhere")),
        ("motion.mp4", "photo.png", ("--output", "refined.txt")),
        ("motion.mp4", "photo.png", ("--output", "/nowhere/refined.mp4")),
        ("motion.mp4", None, ()),
        ("empty.csv", None, ()),
        ("columns.csv", None, ()),
        ("missing.csv", None, ()),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, motion: str, image: str | None, options: tuple[str, ...]
) -> None:
    given: list[str | Path] = [folder / motion, "--output", tmp_path / "refined.mp4"]
    if image is not None:
        given += ["--image", folder / image]
    result = CliRunner().invoke(app, ["refine", "--device", "cpu", *map(str, given), *options])
    assert result.exit_code == EXIT_ERROR, result.output
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "refined.mp4").exists()


def test_output_is_asked_for(folder: Path) -> None:
    result = run(folder / "motion.mp4", "--image", folder / "photo.png")
    assert result.exit_code == EXIT_ERROR
    assert "--output" in result.stderr
