"""The ablation's rows change one thing each, and its table goes to its place in the document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import ablation, fidelity
from benchmarks.ablation import (
    BEGIN,
    END,
    FULL,
    VARIANTS,
    Variant,
    changed_clip,
    differences_of,
    measured,
    plot,
    table,
    with_network,
)
from benchmarks.fidelity import known_clip
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.runner.loading import load_parts
from swifti2v.settings import GenerationSettings
from swifti2v.training.refiner.network import NetworkOptions, load_network, save_network

if TYPE_CHECKING:
    import pytest

RESULTS = {
    "one": {"full": {"psnr": 30.0, "seam_detail": 1.0}, "less": {"psnr": 29.0, "seam_detail": 1.1}},
    "two": {"full": {"psnr": 34.0, "seam_detail": 1.0}, "less": {"psnr": 33.5, "seam_detail": 1.2}},
}
LESS = Variant("less", "less of it")


def test_every_row_is_a_way_that_the_settings_allow() -> None:
    settings = GenerationSettings(size=Size(64, 64), num_frames=9, fps=8.0, refiner="concat", num_inference_steps=1)
    assert VARIANTS[0] is FULL
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS[1:]:
        changed = replace(settings, **variant.settings)
        assert changed != settings or not variant.uses_reference, variant.name
    sizes = {variant.settings["segment_size"] for variant in VARIANTS if "segment_size" in variant.settings}
    assert {1, 2, 4, 5, 6} <= sizes


def test_table_has_differences_and_their_spread() -> None:
    assert differences_of(RESULTS, LESS) == [-1.0, -0.5]
    rows = table(RESULTS, [FULL, LESS]).splitlines()
    assert "| less of it | -0.750 ± 0.250 | 31.25 |" in rows[3]
    assert rows[2].startswith("| **full CSG** | - | 32.00 |")


def test_plot_is_a_picture() -> None:
    picture = plot(RESULTS, [FULL, LESS])
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 1000
    assert picture.std() > 5


def test_variants_are_measured(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_checkpoint, device="cpu")
    rng = np.random.default_rng(0)
    truth = np.stack([rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)] * 9)
    settings = parts.defaults.settled({"size": Size(64, 64), "num_frames": 9, "num_inference_steps": 1})
    clip = known_clip(truth, settings)
    embeds = parts.stage_one.encode_prompt("words").prompt
    by_name = {variant.name: variant for variant in VARIANTS}
    full, alone, bare = (measured(by_name[name], clip, parts, settings, embeds) for name in ("full", "m1", "neither"))
    assert (full["window"], alone["window"], bare["window"]) == (3.0, 3.0, 2.0)
    assert full["psnr"] != alone["psnr"]
    assert changed_clip(by_name["bicubic"], clip).reference is clip.bicubic
    network = load_network(tiny_checkpoint, NetworkOptions())
    network.proj_out.weight.data.zero_()
    save_network(network, tmp_path / "other")
    other = with_network(parts, tmp_path / "other")
    assert measured(FULL, clip, other, settings, embeds)["psnr"] != full["psnr"]


def test_any_checkpoint_at_any_size_into_a_document_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command on a checkpoint of the full layout: rows of its own settings, its prompts, its size."""
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    with VideoWriter(clips / "one.mp4", size=Size(96, 64), fps=8) as writer:
        writer.write(frames)
    item = SimpleNamespace(path=clips / "one.mp4", caption="a small clip")
    monkeypatch.setattr(fidelity, "held_back_clips", lambda _folder: [item])
    rows = [variant for variant in VARIANTS if variant.name in {"full", "no_anchor", "m1", "steps2", "bicubic"}]
    monkeypatch.setattr(ablation, "VARIANTS", tuple(rows))
    document, results = tmp_path / "mine.md", tmp_path / "results"
    options = [
        "--size",
        "96x64",
        "--frames",
        "9",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--document",
        str(document),
    ]
    ablation.main(["--clips", str(clips), "--model", str(tiny_checkpoint), *options, "--output", str(results)])
    text = document.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    for variant in rows:
        assert f"| {variant.label} |" in text
    assert (tmp_path / "images" / "ablation.png").stat().st_size > 1000
