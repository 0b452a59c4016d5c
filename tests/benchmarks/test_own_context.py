"""What is said of a long video is what other code says of it, and a way is judged once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import own_context
from benchmarks.ablation import DOCUMENT
from benchmarks.context_study import BIDIRECTIONAL, settings_for
from benchmarks.fidelity import known_clip
from benchmarks.own_context import BEGIN, COLUMNS, END, WAYS, holding_together, judged_way, table
from swifti2v.pipelines.loading import Parts, load_parts

if TYPE_CHECKING:
    from pathlib import Path

FRAMES = 33


def sliding(num_frames: int) -> np.ndarray:
    """Noise that slides by a pixel a frame, uint8 [F, 64, 64, 3]."""
    picture = np.random.default_rng(0).integers(0, 255, (64, 64 + num_frames, 3), dtype=np.uint8)
    return np.stack([picture[:, t : t + 64] for t in range(num_frames)])


def test_a_video_that_gets_worse_decays() -> None:
    """Noise of twice the deviation in the second half: 6.02 dB; and its borders are no seams."""
    truth = np.full((41, 64, 64, 3), 128, dtype=np.uint8)
    rng = np.random.default_rng(0)
    noisy = [np.clip(frame + rng.normal(0, 4 if t < 21 else 8, frame.shape), 0, 255) for t, frame in enumerate(truth)]
    found = holding_together([frame.round().astype(np.uint8) for frame in noisy], truth, segment_size=3)
    assert found.keys() == COLUMNS.keys()
    assert found["decay"] == pytest.approx(6.02, abs=0.2)
    assert found["drift_sharpness"] == pytest.approx(100, abs=5)


def test_a_step_at_every_segment_is_a_seam() -> None:
    """Frames 1 to 12, 13 to 24, ... are brighter and darker by turns, by 6 of 255."""
    truth = sliding(FRAMES)
    frames = [
        np.clip(frame.astype(int) + 6 * ((t + 11) // 12 % 2), 0, 255).astype(np.uint8) for t, frame in enumerate(truth)
    ]
    stepped, clean = (holding_together(each, truth, segment_size=3) for each in (frames, list(truth)))
    assert stepped["seam_luma"] > 1.2 > clean["seam_luma"]


def test_a_way_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: Parts = load_parts("mini", device="cpu")
    truth = sliding(FRAMES)
    settings = settings_for(parts, FRAMES)
    calls = []

    def made(*_: object) -> tuple[list[np.ndarray], float]:
        calls.append(1)
        return list(truth), 0.0

    monkeypatch.setattr(own_context, "LONG_FRAMES", FRAMES)
    monkeypatch.setattr(own_context, "trained", lambda *_, **__: None)
    monkeypatch.setattr(own_context, "with_network", lambda *_: parts)
    monkeypatch.setattr(own_context, "settings_for", lambda *_: settings)
    monkeypatch.setattr(own_context, "small_clips", lambda *_: [("one", truth), ("two", truth)])
    monkeypatch.setattr(own_context, "known_clip", lambda *_: known_clip(truth[:5], settings_for(parts, 5)))
    monkeypatch.setattr(own_context, "made_frames", made)
    (tmp_path / f"{BIDIRECTIONAL.name}_1").mkdir()
    place = {"parts": parts, "clips": tmp_path, "runs": tmp_path, "max_clips": None}
    first = judged_way(WAYS[0], 1, FRAMES, **place)
    assert first["one"]["psnr"] > 60
    assert judged_way(WAYS[0], 1, FRAMES, **place) == json.loads(json.dumps(first))
    assert len(calls) == 2


def test_the_table_has_the_range_over_networks() -> None:
    seeds = [{"one": dict.fromkeys(COLUMNS, value)} for value in (27.0, 28.0, 30.0)]
    text = table({"own": seeds, "own_frozen": seeds[:1]})
    assert "| trained on its own output: neighbors | 3 | 28.33 (27.00 .. 30.00) |" in text
    assert "frozen: neighbors | 1 | 27.00 |" in text
    assert "trained on the truth" not in text


def test_the_document_has_the_place_of_the_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
