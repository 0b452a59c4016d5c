"""The table of baselines: its rows on a clip made here, its means, its command."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import BASELINES, COLUMNS, LIKENESS, judged, later_frames, made_frames, means, table
from benchmarks.fidelity import KnownClip, known_clip
from swifti2v.evaluation.registry import METRICS
from swifti2v.evaluation.results import Curve, VideoResult
from swifti2v.geometry import Size
from swifti2v.settings import GenerationSettings

if TYPE_CHECKING:
    from pathlib import Path

SIZE = Size(96, 64)
SETTINGS = GenerationSettings(size=SIZE, num_frames=13, fps=16, refiner="concat", neighbors_after=1, segment_size=2)
ROWS = {row.name: row for row in BASELINES}


@pytest.fixture(scope="module")
def clip() -> KnownClip:
    """Thirteen frames of a texture that slides by two pixels a frame."""
    noise = np.random.default_rng(1).uniform(0, 255, (SIZE.height, SIZE.width + 40, 3))
    texture = cv2.GaussianBlur(noise, (0, 0), 1.0)
    texture = ((texture - texture.min()) / np.ptp(texture) * 255).astype(np.uint8)
    truth = np.stack([texture[:, 2 * t : 2 * t + SIZE.width] for t in range(13)])
    return known_clip(truth, SETTINGS)


@pytest.fixture
def parts() -> Any:
    """A Stage II that hands back what it is given, by a codec that keeps pixels as they are, and notes its settings."""
    asked: list[GenerationSettings] = []

    def refine(chunks: Any, settings: GenerationSettings, *, prompt_embeds: Any) -> Any:
        assert prompt_embeds is None
        asked.append(settings)
        return (SimpleNamespace(latents=chunk) for chunk in chunks)

    def decode(latents: Any) -> Any:
        for pixels in latents:
            levels = ((pixels[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
            yield levels.to(torch.uint8)

    codec = SimpleNamespace(encode_stream=iter, decode_stream=decode)
    two = SimpleNamespace(codec=codec, refine=refine, uses_prompt=False)
    return SimpleNamespace(device=torch.device("cpu"), stage_two=two, asked=asked, defaults=SETTINGS)


def test_the_rows_are_those_that_ours_has_to_beat() -> None:
    assert list(ROWS) == [
        "bicubic", "lanczos", "reference", "codec", "ours", "independent", "no_anchor", "still", "truth",
    ]  # fmt: skip


def test_every_row_starts_with_the_image_and_has_all_frames(clip: KnownClip, parts: Any) -> None:
    for row in BASELINES:
        frames, seconds = made_frames(row, clip, parts, SETTINGS, None)
        assert len(frames) == 13
        assert {frame.shape for frame in frames} == {clip.truth[0].shape}
        assert np.abs(frames[0].astype(int) - clip.truth[0]).max() <= 1, row.name
        assert math.isnan(seconds) == (row.name == "truth")
        if row.starts_from is not None:
            assert seconds > clip.seconds[row.starts_from] / 13


def test_ours_is_asked_for_with_what_a_row_leaves_out(clip: KnownClip, parts: Any) -> None:
    for name in ("ours", "independent", "no_anchor"):
        made_frames(ROWS[name], clip, parts, SETTINGS, None)
    whole, independent, no_anchor = parts.asked
    assert whole == SETTINGS
    assert independent == replace(SETTINGS, neighbors_before=0, neighbors_after=0)
    assert no_anchor == replace(SETTINGS, anchor=False)


def test_lanczos_is_not_bicubic_and_is_right_for_a_flat_picture(clip: KnownClip, parts: Any) -> None:
    enlarged = {name: made_frames(ROWS[name], clip, parts, SETTINGS, None)[0] for name in ("bicubic", "lanczos")}
    difference = np.abs(np.stack(enlarged["lanczos"]).astype(int) - np.stack(enlarged["bicubic"]))
    assert difference[0].max() == 0
    assert 0.1 < difference[1:].mean() < 10
    flat = replace(clip, motion=np.full_like(clip.motion, 77))
    assert (np.stack(made_frames(ROWS["lanczos"], flat, parts, SETTINGS, None)[0])[1:] == 77).all()


def test_what_is_known_of_rows_comes_out(clip: KnownClip, parts: Any) -> None:
    scores = {
        name: judged(name, made_frames(ROWS[name], clip, parts, SETTINGS, None)[0], clip, fps=16, segment_size=2)
        for name in ("bicubic", "reference", "still", "truth")
    }
    assert scores["truth"]["psnr"] == 100
    assert scores["truth"]["ssim"] == pytest.approx(1)
    assert scores["truth"]["high_frequency_ratio"] == pytest.approx(1)
    assert scores["reference"]["psnr"] > scores["bicubic"]["psnr"] + 3
    assert scores["bicubic"]["high_frequency_ratio"] < scores["reference"]["high_frequency_ratio"] < 1
    assert scores["still"]["still_share"] == 100
    assert scores["still"]["warping_error"] == 0 < scores["truth"]["warping_error"]
    assert scores["still"]["psnr"] < scores["bicubic"]["psnr"]
    assert COLUMNS.keys() - scores["bicubic"].keys() <= {"seconds_per_frame", "vmaf"}


def test_frame_zero_does_not_count_as_likeness() -> None:
    curves = (Curve("psnr", (0, 1, 2), (100.0, 30.0, 32.0)), Curve("vmaf", (0, 4), (97.0, 50.0)))
    values = {"psnr": 54.0, "vmaf": 73.5, "flicker": 1.0}
    result = VideoResult("a", None, 8, 8, 3, 16.0, values, curves=(*curves, Curve("flicker", (0, 1), (9.0, 9.0))))
    assert later_frames(result) == {"psnr": 31.0, "vmaf": 50.0, "flicker": 1.0}


def test_columns_are_registered_measures() -> None:
    registered = {metric.name for metric in METRICS}
    assert COLUMNS.keys() - {"seconds_per_frame"} <= registered
    assert set(LIKENESS) <= COLUMNS.keys()


def numbers(value: float, **others: float) -> dict[str, dict[str, float]]:
    return {row.name: {"psnr": value, **others} for row in BASELINES}


def test_means_leave_out_what_is_not_defined() -> None:
    both = {"a": numbers(30, seam_luma=1.5), "b": numbers(34, seam_luma=math.nan), "c": numbers(35)}
    found = means(both)["ours"]
    assert found["psnr"] == 33
    assert found["seam_luma"] == 1.5


def test_the_table_has_a_line_for_each_row() -> None:
    lines = table({"a": numbers(30, ssim=0.5), "b": numbers(34, ssim=0.75)}).splitlines()
    assert len(lines) == 2 + len(BASELINES)
    assert {line.count("|") for line in lines} == {2 + len(COLUMNS)}
    assert lines[0].startswith("| mean of 2 clips | PSNR (dB) | SSIM |")
    assert lines[6].startswith("| **ours** | 32.00 | 0.625 | - |")


def test_the_command_prints_a_table_and_writes_every_number(
    parts: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    def clips(found: Any, arguments: argparse.Namespace) -> Any:
        assert found is parts
        assert (arguments.size, arguments.frames) == ("32x32", 5)
        yield SimpleNamespace(path=tmp_path / "noise.mp4", caption="noise"), known_clip(truth, SETTINGS), SETTINGS

    def load(_name: str) -> Any:
        return SimpleNamespace(parts=parts)

    monkeypatch.setattr(baselines.TwoStagePipeline, "from_pretrained", load)
    monkeypatch.setattr(baselines, "known_clips", clips)
    monkeypatch.setattr(baselines, "open_vmaf", lambda _size: None)
    output = tmp_path / "numbers.json"
    options = ["--clips", str(tmp_path), "--frames", "5", "--size", "32x32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["baselines", *options])
    baselines.main()
    shown = capsys.readouterr()
    assert len(shown.out.strip().splitlines()) == 2 + len(BASELINES)
    assert "VMAF: not installed" in shown.err
    content = json.loads(output.read_text())
    assert content["results"]["noise"].keys() == content["mean"].keys() == ROWS.keys()
    assert content["mean"]["truth"]["psnr"] == 100
    assert content["mean"]["truth"]["seconds_per_frame"] is None
    assert str(tmp_path) not in output.read_text()
