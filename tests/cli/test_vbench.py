"""`swifti2v vbench` from the command line: all four commands on a stand-in for VBench."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from swifti2v.cli.main import EXIT_ERROR, ReportingGroup
from swifti2v.cli.vbench import app as vbench
from swifti2v.evaluation.vbench.generation import StillMaker
from swifti2v.media.video_reader import VideoReader
from tests.evaluation.vbench_checkout import MAGI_ONE, make_checkout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Run = Callable[..., Result]

STILL = ("--model", "still", "--frames", "5", "--fps", "8")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    app = typer.Typer(cls=ReportingGroup, add_completion=False)
    app.add_typer(vbench, name="vbench")

    def invoke(command: str, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["vbench", command, *map(str, arguments)])

    return invoke


@pytest.fixture
def suite(run: Run, tmp_path: Path) -> Path:
    make_checkout(tmp_path / "VBench")
    result = run("prepare", "--vbench", tmp_path / "VBench", "--size", "64x64", "--output", tmp_path / "suite")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'suite'}: 2 pictures of 64x64, 3 prompts\n"
    assert "1118" in result.stderr
    return tmp_path / "suite"


def test_from_the_checkout_to_the_total(run: Run, suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    made = run("generate", suite, "--output", output, "--samples", "2", *STILL)
    assert made.exit_code == 0, made.output
    assert made.stdout == f"{output / 'videos'}: 6 videos made, 0 were there\n"
    assert made.stderr.splitlines()[0].startswith("1/6 a bear in the water-0.mp4: ")
    again = run("generate", suite, "--output", output, "--samples", "2", *STILL)
    assert again.stdout.endswith("0 videos made, 6 were there\n")
    told = ("--suite", suite, "--vbench", tmp_path / "VBench", "--python", sys.executable, "--samples", "2")
    scored = run("score", output / "videos", *told, "--output", tmp_path / "results")
    assert scored.exit_code == 0, scored.output
    assert "i2v_subject               98.39\n" in scored.stdout
    assert "scoring camera_motion, 2 videos" in scored.stderr
    total = run("total", tmp_path / "results")
    assert total.exit_code == 0, total.output
    assert total.stdout.splitlines()[-3:] == [
        "I2V                       96.12",
        "Quality                   82.44",
        "Total                     89.28",
    ]


def test_shards_make_all_videos_between_them(run: Run, suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for number in (1, 2):
        result = run("generate", suite, "--output", output, "--samples", "1", "--shard", f"{number}/2", *STILL)
        assert result.exit_code == 0, result.output
    assert len(list((output / "videos").iterdir())) == 3
    counts = [len((output / f"clips.{number}-of-2.jsonl").read_text().splitlines()) for number in (1, 2)]
    assert counts == [2, 1]


def test_options(run: Run, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("num_frames: 5\nfps: 12\n")
    given = ("--options", tmp_path / "options.yaml", "--model", "still")
    result = run(
        "generate", suite, "--output", tmp_path / "run", *given, "--dimension", "camera_motion", "--limit", "1"
    )
    assert result.exit_code == 0, result.output
    (video,) = (tmp_path / "run" / "videos").iterdir()
    assert video.name == "a beach at dusk, camera pans left-0.mp4"
    info = VideoReader(video).info
    assert (info.num_frames, info.fps) == (5, 12)
    for line in ("seed: 3", "size: [64, 64]"):
        (tmp_path / "options.yaml").write_text(line)
        result = run("generate", suite, "--output", tmp_path / "other", *given)
        assert result.exit_code == EXIT_ERROR
        assert "sets size or seed" in result.stderr


def test_the_end_of_memory_is_one_line(run: Run, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(_maker: StillMaker, _clip: object) -> None:
        raise MemoryError

    monkeypatch.setattr(StillMaker, "frames", frames)
    result = run("generate", suite, "--output", tmp_path / "run", *STILL)
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: there is not enough memory to make ")


def test_total_of_plain_scores(run: Run, tmp_path: Path) -> None:
    scores = {name: value for name, value in MAGI_ONE.items() if name != "camera_motion"}
    (tmp_path / "scores.json").write_text(json.dumps(scores | {"dynamic_degree": 0.0}))
    assert run("total", tmp_path / "scores.json").exit_code == EXIT_ERROR
    result = run("total", tmp_path / "scores.json", "--missing-as-zero", "--json")
    assert result.exit_code == 0
    totals = json.loads(result.stdout)
    assert totals["i2v"] == pytest.approx(0.961168 - 0.05085 / 2.1, abs=1e-6)
    assert totals["quality"] == pytest.approx(0.824356 - 0.6821 / 11, abs=1e-6)
    assert len(totals["notes"]) == 2
    assert "note: only 0.0% of the videos move" in run("total", tmp_path / "scores.json", "--missing-as-zero").stderr


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("prepare", ["--vbench", "nowhere", "--size", "64x64", "-o", "s"], "give a git checkout"),
        ("prepare", ["--vbench", "nowhere", "--size", "big", "-o", "s"], "WIDTHxHEIGHT"),
        ("generate", ["nowhere", "-o", "r"], "vbench prepare"),
        ("generate", ["nowhere", "-o", "r", "--shard", "3/2"], "of the form i/n"),
        (
            "score",
            ["nowhere", "--suite", "nowhere", "--vbench", "v", "--python", "python", "-o", "r"],
            "vbench prepare",
        ),
        ("total", ["nowhere"], "does not exist"),
    ],
)
def test_errors_are_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(command, *arguments)
    assert result.exit_code == EXIT_ERROR, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help(run: Run) -> None:
    for command in ("prepare", "generate", "score", "total"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout
