"""`swifti2v evaluate` from the command line to its table, its files, its JSON and its errors."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from swifti2v.cli import evaluate as command
from swifti2v.cli.main import EXIT_ERROR, ReportingGroup
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

HEIGHT, WIDTH, FRAMES = 64, 96, 4

app = typer.Typer(cls=ReportingGroup, add_completion=False, pretty_exceptions_enable=False)
app.command()(command.evaluate)


@app.callback()
def _group() -> None:
    """Keep the command a sub-command, as it is in the whole program."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    coarse = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    plane = np.asarray(Image.fromarray(coarse).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    frames = np.stack([plane[:, 2 * t : 2 * t + WIDTH] for t in range(FRAMES)])
    for name, pixels in (("clip", frames), ("dark", frames // 2), ("[odd]", frames[:1].repeat(FRAMES, axis=0))):
        with VideoWriter(root / f"{name}.mp4", size=Size(WIDTH, HEIGHT), fps=8, crf=2, preset="ultrafast") as writer:
            writer.write(pixels)
    Image.fromarray(frames[0]).save(root / "image.png")
    noise = np.random.default_rng(1).integers(0, 256, (16, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with VideoWriter(root / "broken.mp4", size=Size(WIDTH, HEIGHT), fps=8, preset="ultrafast") as writer:
        writer.write(noise)
    whole = (root / "broken.mp4").read_bytes()
    (root / "broken.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    return root


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_table_has_videos_rivals_and_the_control(folder: Path) -> None:
    result = run(folder / "clip.mp4", "--against", folder / "dark.mp4", "--image", folder / "image.png")
    assert result.exit_code == 0, result.output
    head = next(line for line in result.stdout.splitlines() if "clip" in line)
    assert head.split() == ["clip", "dark", "still", "image"]
    for words in ("frame 0 PSNR (dB)", "detail retention", "seam ratio, luma", "saturation drift", "motion (px/frame)"):
        assert words in result.stdout
    assert "high-frequency ratio" not in result.stdout
    assert "note: still image: a control" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["clip.mp4", "dark.mp4", "[odd].mp4", "image.png", "broken.mp4"]
    )


def test_json_is_one_object_without_nan(folder: Path) -> None:
    result = run(folder / "clip.mp4", "--truth", folder / "clip.mp4", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    summary = json.loads(result.stdout, parse_constant=refuse)
    clip, still = summary["videos"]
    assert (clip["label"], clip["size"], clip["num_frames"], clip["fps"]) == ("clip", "96x64", FRAMES, 8)
    assert clip["values"]["psnr"] == 100
    assert clip["values"]["seam_luma"] is None
    assert still["path"] is None
    assert summary["files"] == []
    assert summary["seconds"] > 0


def test_output_holds_numbers_a_table_and_the_report(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "results"
    result = run(folder / "clip.mp4", "--image", folder / "image.png", "-o", output)
    assert result.exit_code == 0, result.output
    evaluation = json.loads((output / "results.json").read_text())
    assert [video["label"] for video in evaluation["videos"]] == ["clip", "still image"]
    assert evaluation["image"] == str(folder / "image.png")
    assert "frame 0 PSNR" in (output / "results.md").read_text(encoding="utf-8")
    written = sorted(path.name for path in output.iterdir())
    assert written == ["report.html", "results.json", "results.md"]
    assert result.stdout.splitlines()[-3:] == [str(output / name) for name in (written[1], written[2], written[0])]


def test_the_segment_size_may_be_found(folder: Path) -> None:
    assert "likeliest segment size" in run(folder / "clip.mp4", "--segment-size", "auto").stdout


def test_a_still_video_is_flagged_and_a_name_is_no_markup(folder: Path) -> None:
    result = run(folder / "[odd].mp4")
    assert "note: [odd]: this is a still picture" in result.stderr
    assert "[odd]" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.mp4",), "does not exist; check the path"),
        (("broken.mp4",), "is damaged after"),
        (("clip.mp4", "--image", "none.png"), "does not exist"),
        (("clip.mp4", "--truth", "image.png"), "not a readable video"),
        (("clip.mp4", "--against", "none.mp4"), "does not exist"),
        (("clip.mp4", "--segment-size", "1"), "use at least 2, or auto"),
        (("clip.mp4", "--segment-size", "three"), "use a number from 2 on, or auto"),
        (("clip.mp4", "--cvvdp", "python"), "give --truth"),
        (("clip.mp4", "--truth", "clip.mp4", "--cvvdp", "no.python"), "name the Python of ColorVideoVDP's environment"),
        (("clip.mp4", "-o", "clip.mp4"), "choose one that is writable"),
    ],
)
def test_refusals_are_one_line(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    given = [folder / each if "." in each else each for each in arguments]
    result = run(*given)
    assert result.exit_code == EXIT_ERROR
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_bad_output_is_told_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swifti2v.evaluation import evaluate as judging

    def work(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the videos were judged first")

    monkeypatch.setattr(judging, "evaluate_videos", work)
    assert run(folder / "clip.mp4", "-o", folder / "clip.mp4" / "inside").exit_code == EXIT_ERROR


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_report_that_cannot_be_made_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr("swifti2v.evaluation.evaluate.evaluate_videos", lambda *given, **_: measured.append(given))
    monkeypatch.setitem(sys.modules, missing, None)
    result = run(folder / "clip.mp4", "--output", tmp_path / "report")
    assert (result.exit_code, measured) == (EXIT_ERROR, [])
    assert result.stderr == (
        f"error: --output needs {missing}; install what is missing with: pip install 'swifti2v[evaluate]'\n"
    )
    assert not (tmp_path / "report").exists()
