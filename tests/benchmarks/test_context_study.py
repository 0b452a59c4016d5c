"""The study trains each network once, changes one thing a row, and its tables say what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import context_study
from benchmarks.ablation import Variant, with_network
from benchmarks.context_study import (
    BIDIRECTIONAL,
    FROZEN,
    LONG,
    LONG_COLUMNS,
    NETWORKS,
    RECIPE,
    SHORT,
    WITH_ARTIFACTS,
    artifacts_table,
    curves,
    judge_artifacts,
    judge_long,
    judge_seeds,
    judge_short,
    long_numbers,
    long_table,
    seeds_table,
    settings_for,
    small_clips,
    to_and_fro,
    trained,
    with_artifacts,
)
from benchmarks.fidelity import known_clip
from swifti2v.config import load_yaml
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.mini.recipes import StageTwoRun
from swifti2v.runner.loading import load_parts
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runner.parts import Parts

SMALL = Size(64, 64)
FRAMES = 9


def moving(num_frames: int, size: Size) -> np.ndarray:
    """Noise that slides by a pixel a frame, uint8 [F, H, W, 3]."""
    picture = np.random.default_rng(0).integers(0, 255, (size.height, size.width + num_frames, 3), dtype=np.uint8)
    return np.stack([picture[:, t : t + size.width] for t in range(num_frames)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index: a narrow clip to train on, a photograph, and one wide clip that is held back."""
    import cv2

    folder = tmp_path_factory.mktemp("clips")
    cv2.imwrite(str(folder / "photo.png"), cv2.resize(moving(1, Size(40, 20))[0], (480, 320)))
    for name, size in (("narrow", Size(96, 64)), ("wide", Size(1152, 128))):
        with VideoWriter(folder / f"{name}.mp4", size=size, fps=8) as writer:
            writer.write(moving(12, size))
    (folder / "INDEX.csv").write_text(
        "file,kind,width,caption,licence_tier,licence\n"
        "narrow.mp4,clip,96,hills,A,CC0\nwide.mp4,clip,1152,sea,A,CC0\nphoto.png,photo,480,a lake,A,CC0\n"
    )
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clips of 64x64 and nine frames, and a recipe of three steps."""
    recipe = load_yaml(StageTwoRun, RECIPE)
    text = RECIPE.read_text(encoding="utf-8")
    for old, new in {
        f"num_steps: {recipe.loop.num_steps}": "num_steps: 3",
        "checkpoint_every: 100": "checkpoint_every: 3",
        "width: 256": "width: 64",
        "head_width: 64": "head_width: 32",
        "num_layers: 3": "num_layers: 1",
        "num_frames: 33": f"num_frames: {FRAMES}",
        "procedural_width: 320": "procedural_width: 96",
        "procedural_height: 192": "procedural_height: 64",
        "crops: [[16, 16]]": "crops: [[8, 8]]",
        "per_photograph: 3": "per_photograph: 1",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "context.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(context_study, "RECIPE", tmp_path / "context.yaml")
    monkeypatch.setattr(context_study, "SIZE", SMALL)
    monkeypatch.setattr(context_study, "SHRINK", 2)
    monkeypatch.setattr(context_study, "SHORT_FRAMES", FRAMES)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return load_parts("mini", device="cpu")


@pytest.mark.parametrize("rows", [SHORT, LONG])
def test_every_row_changes_something(rows: tuple[Variant, ...], parts: Parts) -> None:
    settings = settings_for(parts, 33)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows[1:]:
        changed = replace(settings, **row.settings)
        assert (changed != settings) or (row.network is not None), row.name
        assert row.network is None or row.network in NETWORKS


@pytest.mark.usefixtures("small")
def test_networks_are_trained_once_and_share_their_pairs(clips: Path, tmp_path: Path, parts: Parts) -> None:
    runs = tmp_path / "runs"
    folders = [trained(network, seed, clips=clips, runs=runs) for network, seed in ((BIDIRECTIONAL, 0), (FROZEN, 1))]
    weights = [folder / "diffusion_pytorch_model.safetensors" for folder in folders]
    made = [path.stat().st_mtime_ns for path in weights]
    pairs = [folder.parent / "pairs.pt" for folder in folders]
    assert pairs[0].samefile(pairs[1])
    assert [StageTwoTransformer.from_pretrained(each).config.context_attention for each in folders] == [
        "bidirectional",
        "frozen",
    ]
    trained(BIDIRECTIONAL, 0, clips=clips, runs=runs)
    assert [path.stat().st_mtime_ns for path in weights] == made

    coded = trained(WITH_ARTIFACTS, 0, clips=clips, runs=runs)
    assert not (coded.parent / "pairs.pt").samefile(pairs[0])

    networks = {"bidirectional": with_network(parts, folders[0]), "frozen": with_network(parts, folders[1])}
    results = judge_short(networks, clips)
    assert list(results) == ["wide"]
    assert {"full", "neither", "kept", "frozen"} <= results["wide"].keys()
    assert "clean_context" not in results["wide"], "no such network was given"
    seeds = judge_seeds({("bidirectional", 0): networks["bidirectional"], ("frozen", 1): networks["frozen"]}, clips)
    assert seeds["bidirectional"]["psnr"] == [pytest.approx(results["wide"]["full"]["psnr"], abs=1e-6)]
    assert seeds["frozen"]["high_frequency_ratio"] == [
        pytest.approx(results["wide"]["frozen"]["high_frequency_ratio"], abs=1e-6)
    ]
    by_seed = {("bidirectional", 0): networks["bidirectional"], ("artifacts", 0): with_network(parts, coded)}
    found = judge_artifacts(by_seed, clips)
    assert found["clean"]["bidirectional"][0] > found["with artifacts"]["bidirectional"][0]


@pytest.mark.usefixtures("small")
def test_clips_are_reduced_and_short_ones_left_out(clips: Path) -> None:
    found = dict(small_clips(clips, FRAMES))
    assert {name: frames.shape for name, frames in found.items()} == {"wide": (FRAMES, 64, 64, 3)}
    assert dict(small_clips(clips, 33)) == {}


def test_to_and_fro_ends_where_it_began() -> None:
    frames = moving(5, Size(8, 8))
    doubled = to_and_fro(frames)
    assert len(doubled) == 9
    assert np.array_equal(doubled[:5], frames)
    assert np.array_equal(doubled[4:], frames[::-1])


def test_artifacts_spare_the_image(parts: Parts) -> None:
    clip = known_clip(moving(FRAMES, Size(128, 64)), settings_for(parts, FRAMES))
    coded = with_artifacts(clip)
    assert np.array_equal(coded.reference[0].numpy(), clip.reference[0].numpy())
    assert float((coded.reference[1] - clip.reference[1]).abs().mean()) > 0.01


def test_a_video_that_gets_worse_decays() -> None:
    """Noise of twice the deviation in the second half: 6.02 dB; and its borders are no seams."""
    truth = np.full((41, 64, 64, 3), 128, dtype=np.uint8)
    rng = np.random.default_rng(0)
    noisy = [np.clip(frame + rng.normal(0, 4 if t < 21 else 8, frame.shape), 0, 255) for t, frame in enumerate(truth)]
    found = long_numbers([frame.round().astype(np.uint8) for frame in noisy], truth, segment_size=3)
    assert found.keys() == LONG_COLUMNS.keys() | {"curve"}
    assert found["decay"] == pytest.approx(6.02, abs=0.2)
    assert found["drift_sharpness"] == pytest.approx(100, abs=5)


def test_a_step_at_every_segment_is_a_seam() -> None:
    """Frames 1 to 12, 13 to 24, ... are brighter and darker by turns, by 6 of 255."""
    truth = moving(33, Size(64, 64))
    frames = [
        np.clip(frame.astype(int) + 6 * ((t + 11) // 12 % 2), 0, 255).astype(np.uint8) for t, frame in enumerate(truth)
    ]
    stepped, clean = (long_numbers(each, truth, segment_size=3) for each in (frames, list(truth)))
    assert stepped["seam_luma"] > 1.2 > clean["seam_luma"]


def test_a_long_row_is_judged_once(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = moving(33, Size(64, 64))
    settings = settings_for(parts, 33)
    calls = []

    def made(*_: object) -> tuple[list[np.ndarray], float]:
        calls.append(1)
        return list(truth), 0.0

    monkeypatch.setattr(context_study, "LONG_FRAMES", 33)
    monkeypatch.setattr(context_study, "trained", lambda *_, **__: None)
    monkeypatch.setattr(context_study, "with_network", lambda *_: parts)
    monkeypatch.setattr(context_study, "settings_for", lambda *_: settings)
    monkeypatch.setattr(context_study, "small_clips", lambda *_: [("one", truth), ("two", truth)])
    monkeypatch.setattr(context_study, "known_clip", lambda *_: known_clip(truth[:5], settings_for(parts, 5)))
    monkeypatch.setattr(context_study, "made_frames", made)
    (tmp_path / f"{BIDIRECTIONAL.name}_1").mkdir()
    place = {"parts": parts, "clips": tmp_path, "runs": tmp_path, "max_clips": None}
    first = judge_long(LONG[0], 1, 33, **place)
    assert first["one"]["psnr"] > 60
    assert judge_long(LONG[0], 1, 33, **place) == json.loads(json.dumps(first))
    assert len(calls) == 2


def test_tables_and_plot() -> None:
    found = {"clean": {"bidirectional": [30.0, 31.0], "artifacts": [29.0, 29.5]}}
    assert "| trained on clean references | 30.500 (30.000 .. 31.000) |" in artifacts_table(found)
    measures = {"psnr": [27.0, 28.0], "high_frequency_ratio": [0.3], "seam_luma": [1.0], "seam_detail": [1.1]}
    assert "| frozen | 27.500 (27.000 .. 28.000) | 0.300 (0.300 .. 0.300) |" in seeds_table({"frozen": measures})
    seeds: list[dict[str, Any]] = [
        {"one": dict.fromkeys(LONG_COLUMNS, psnr) | {"curve": [psnr] * 8}} for psnr in (27.0, 28.0, 30.0)
    ]
    text = long_table({"own": seeds, "own_frozen": seeds[:1]})
    assert "| trained on its own output | 3 | 28.33 (27.00 .. 30.00) |" in text
    assert "frozen | 1 | 27.00 (27.00 .. 27.00) |" in text
    assert "full CSG" not in text
    assert curves({9: {"own": seeds}, 17: {"own": seeds}}).shape[2] == 3
