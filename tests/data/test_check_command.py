"""`swifti2v data check`: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from swifti2v.cli import data
from swifti2v.cli.main import ReportingGroup

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

OPTIONS = ("--size", "96x64", "--frames", "9")


@pytest.fixture
def folder(tmp_path: Path, write_video: Any, moving: Any) -> Path:
    """Two usable videos of different aspect, one broken, one short, one without a caption."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_video(folder / "wide.mp4", moving(20))
    write_video(folder / "tall.mp4", moving(20, width=64, height=96))
    write_video(folder / "short.mp4", moving(5))
    write_video(folder / "silent.mp4", moving(12, seed=3))
    (folder / "broken.mp4").write_bytes(b"no video at all")
    lines = ["video,prompt", "wide.mp4,a", "tall.mp4,b", "short.mp4,c", "silent.mp4,", "broken.mp4,d"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def run(*arguments: str) -> Result:
    app = typer.Typer(cls=ReportingGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.add_typer(data.app, name="data")
    return CliRunner().invoke(app, ["data", "check", *arguments])


def test_tables(folder: Path) -> None:
    result = run(str(folder), *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert "accepted 2 clips from 2 videos" in result.stdout
    assert "listed in metadata.csv" in " ".join(result.stdout.split())
    assert "skipped 3: " in result.stdout
    for word in ("96x64x9", "64x96x9", "broken.mp4", "unreadable", "short.mp4", "too short", "empty caption"):
        assert word in result.stdout


def test_json_and_report(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run(str(folder), *OPTIONS, "--json", "--report", str(report), "--extraction", "slide")
    printed = json.loads(result.stdout)
    assert printed["clips_by_bucket"] == {"96x64x9": 2, "64x96x9": 2}
    assert printed["skipped_by_reason"] == {"unreadable": 1, "too short": 1, "empty caption": 1}
    written = json.loads(report.read_text())
    assert written == {key: value for key, value in printed.items() if key not in ("source", "clips_by_bucket")}


def test_options_reach_what_they_name(folder: Path) -> None:
    kept = json.loads(run(str(folder), *OPTIONS, "--json", "--keep-empty-captions", "--frames", "5").stdout)
    assert [scene["name"] for scene in kept["scenes"]] == ["wide.mp4", "tall.mp4", "short.mp4", "silent.mp4"]
    wide = json.loads(run(str(folder), *OPTIONS, "--json", "--max-aspect", "1").stdout)
    assert wide["clips_by_bucket"] == {"96x64x9": 1}
    assert "smaller than its bucket" in wide["skipped_by_reason"]


def test_nothing_usable_is_an_error_after_the_tables(folder: Path) -> None:
    result = run(str(folder), "--size", "1280x704", "--frames", "9")
    assert result.exit_code == 2
    assert "too small" in result.stdout
    *progress, error = result.stderr.splitlines()
    assert error.startswith("error: nothing in ")
    assert all(line.startswith("videos: ") for line in progress)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frames", "10"), "4k+1"),
        (("--size", "100x64"), "not a multiple of 32"),
        (("--report", "report.xlsx"), ".json or .csv"),
        (("--manifest", "gone.csv"), "there is no manifest"),
    ],
)
def test_wrong_options_fail_before_anything_is_read(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(str(folder), *OPTIONS, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_column(folder: Path) -> None:
    (folder / "metadata.csv").write_text("clip,prompt\nwide.mp4,a\n")
    result = run(str(folder))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no column for the video" in result.stderr


def test_the_module_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'cv2', 'av', 'numpy', 'safetensors'}"
    code = f"import sys, swifti2v.cli.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout.strip() == "[]"
