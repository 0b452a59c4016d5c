"""Which clips are held back, how they are cut, and what is written."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ablation, context_study, few_steps
from benchmarks.clips import held_back_clips, truth_frames
from benchmarks.results import markdown_table, mean, number, settings_of, write_between, write_results
from swifti2v.errors import ConfigurationError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Six frames of 96x64, bright in the middle 64x32."""
    frames = np.zeros((6, 64, 96, 3), dtype=np.uint8)
    frames[:, 16:48, 16:80] = 200
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, size=Size(96, 64), fps=8) as writer:
        writer.write(frames)
    return path


def test_only_wide_clips_are_held_back(tmp_path: Path) -> None:
    lines = ["file,kind,width,caption", "a.mp4,clip,1280,x", "b.mp4,clip,1151,x", "c.jpg,photo,4000,x"]
    (tmp_path / "INDEX.csv").write_text("\n".join(lines), encoding="utf-8")
    for name in ("a.mp4", "b.mp4", "c.jpg"):
        (tmp_path / name).touch()
    assert [item.path.name for item in held_back_clips(tmp_path)] == ["a.mp4"]
    with pytest.raises(ConfigurationError, match="no clip at least 2000"):
        held_back_clips(tmp_path, min_width=2000)


def test_the_truth_is_the_center_of_4k_plus_1_frames(clip: Path) -> None:
    truth = truth_frames(clip, Size(64, 32), 9)
    assert truth.shape == (5, 32, 64, 3)
    assert truth[:, 4:-4, 4:-4].min() > 180
    with pytest.raises(ConfigurationError, match="smaller than 128x64"):
        truth_frames(clip, Size(128, 64), 9)


def test_results_are_strict_json_without_the_paths_of_a_machine(tmp_path: Path) -> None:
    told = argparse.Namespace(clips=Path("/data/clips"), frames=9, output=None)
    content = {"settings": settings_of(told), "psnr": math.nan, "list": (1, 2.5, True, None), 3: np.float64(0.5)}
    path = write_results("theme", content, tmp_path / "folder" / "r.json")
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert read["settings"]["clips"] == "clips"
    assert "output" not in read["settings"]
    assert (read["psnr"], read["list"], read["3"]) == (None, [1, 2.5, True, None], 0.5)


def test_cells() -> None:
    assert markdown_table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert (number(math.nan), number(None), number(1.005, 1)) == ("-", "-", "1.0")
    assert mean([1, None, math.nan, 3]) == 2
    assert math.isnan(mean([]))


@pytest.mark.parametrize("study", [ablation, context_study, few_steps])
def test_a_table_goes_between_its_marks_of_which_the_document_has_one_pair(study: Any, tmp_path: Path) -> None:
    copy = tmp_path / "document.md"
    copy.write_text(f"before\n{study.BEGIN}\nold\n{study.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_between(copy, "| new |", begin=study.BEGIN, end=study.END)
        assert copy.read_text() == f"before\n{study.BEGIN}\n\n| new |\n\n{study.END}\nafter\n"
    with pytest.raises(ValueError, match="no marks"):
        write_between(copy, "| new |", begin="<!-- other -->", end=study.END)
    text = ablation.DOCUMENT.read_text(encoding="utf-8")
    assert text.count(study.BEGIN) == text.count(study.END) == 1
