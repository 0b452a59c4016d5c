"""Fingerprints: what changes them, and what is said of a difference."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v.data.clips import ClipRequest
from swifti2v.data.fingerprint import clip_stamps, difference, fingerprint_of, recipe_of, weights_digest
from swifti2v.geometry import Size


@pytest.fixture
def clip(tmp_path: Path) -> ClipRequest:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"content")
    return ClipRequest("a.mp4@0", path, "a cat", 0, 9, 16.0, Size(64, 32))


def test_difference_names_what_differs() -> None:
    old = fingerprint_of(codec="c1", settings={"num_frames": 49, "dtype": "bfloat16", "mode": "replace"})
    assert difference(old, old) == ""
    assert difference(fingerprint_of(codec="c2", settings={"num_frames": 49, "dtype": "bfloat16", "mode": "replace"}),
                      old) == "the codec (c1, now c2)"  # fmt: skip
    new = fingerprint_of(codec="c1", settings={"num_frames": 81, "dtype": "bfloat16", "size": Size(64, 32)})
    assert difference(new, old) == (
        'the setting mode ("replace", now not set), the setting num_frames (49, now 81), '
        "the setting size (not set, now [64, 32])"
    )


def test_order_of_settings_does_not_matter() -> None:
    assert fingerprint_of(codec="c", settings={"a": 1, "b": 2}) == fingerprint_of(codec="c", settings={"b": 2, "a": 1})


def test_text_of_another_origin() -> None:
    assert difference("abc", "abc") == ""
    assert difference("abc", "def") == "the fingerprint (def, now abc)"
    assert difference("3", "4") == "the fingerprint (4, now 3)"
    assert recipe_of("abc") == recipe_of("abc") != recipe_of("abd")


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a dog"}, {"first_frame": 4}, {"num_frames": 5}, {"fps": 24.0}, {"size": Size(32, 32)}],
    ids=lambda change: next(iter(change)),
)
def test_a_stamp_changes_with_its_clip(clip: ClipRequest, change: dict[str, Any]) -> None:
    before = clip_stamps([clip], "mtime")
    assert clip_stamps([clip], "mtime") == before
    assert clip_stamps([replace(clip, **change)], "mtime") != before


def test_a_stamp_changes_with_its_file(clip: ClipRequest) -> None:
    by_time, by_content = clip_stamps([clip], "mtime"), clip_stamps([clip], "content")
    os.utime(clip.path, ns=(1, 1))
    assert clip_stamps([clip], "mtime") != by_time
    assert clip_stamps([clip], "content") == by_content
    clip.path.write_bytes(b"CONTENT")
    assert clip_stamps([clip], "content") != by_content
    clip.path.unlink()
    assert clip_stamps([clip], "mtime") == clip_stamps([clip], "content")


def test_sources_are_compared_where_they_are_asked_for(clip: ClipRequest) -> None:
    without = fingerprint_of(codec="c", settings={})
    before = fingerprint_of(codec="c", settings={}, clips=[clip])
    clip.path.write_bytes(b"longer content")
    after = fingerprint_of(codec="c", settings={}, clips=[clip])
    assert difference(after, before) == "the source files or captions"
    assert difference(without, before) == ""
    assert recipe_of(before) == recipe_of(after) == without


def test_weights_digest() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    digest = weights_digest({"width": 3}, weights)
    assert digest == weights_digest({"width": 3}, dict(reversed(weights.items())))
    others = [
        ({"width": 4}, weights),
        ({"width": 3}, weights | {"a": weights["a"].reshape(3, 2)}),
        ({"width": 3}, weights | {"a": weights["a"].nextafter(torch.tensor(9.0))}),
        ({"width": 3}, weights | {"b": torch.ones((), dtype=torch.float16)}),
        ({"width": 3}, {"a": weights["a"], "c": weights["b"]}),
    ]
    assert digest not in {weights_digest(*other) for other in others}
