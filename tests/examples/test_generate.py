"""The example script, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
PICTURE = str(FOLDER / "lake-sherburne.jpg")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "generate.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)  # noqa: S603 - our own


@pytest.mark.slow
def test_the_script_makes_a_video(tmp_path: Path) -> None:
    output = tmp_path / "lake.mp4"
    done = run(PICTURE, str(output), "--size", "64x32", "--frames", "9")
    assert done.returncode == 0, done.stderr
    with av.open(output) as container:
        frames = list(container.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(64, 32)] * 9
    assert "stage_two: 1 of 1 (segment 1 of 1)" in done.stderr
    assert "frames: 9 of 9" in done.stderr
    assert "note: the prompt is empty" in done.stderr


@pytest.mark.slow
def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = run(PICTURE, str(tmp_path / "lake.mp4"), "--size", "65x32")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
