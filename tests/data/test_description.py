"""The description of a cache: what changes the hash of a sample, and what is said of a difference."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v.data.clips import ClipRequest
from swifti2v.data.description import differences, sample_hashes, weights_digest
from swifti2v.geometry import Size


@pytest.fixture
def clip(tmp_path: Path) -> ClipRequest:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"content")
    return ClipRequest("a.mp4@0", path, "a cat", 0, 9, 16.0, Size(64, 32))


def test_differences_name_what_differs() -> None:
    old = {"codec": "c1", "encoding": {"num_frames": 49, "mode": "replace"}}
    new = {"encoding": {"size": [64, 32], "num_frames": 81}, "codec": "c1"}
    assert differences(old, dict(reversed(old.items()))) == ""
    assert differences(new, old) == (
        'encoding.mode ("replace", now not set), encoding.num_frames (49, now 81), encoding.size (not set, now [64,32])'
    )


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a dog"}, {"first_frame": 4}, {"num_frames": 5}, {"fps": 24.0}, {"size": Size(32, 32)}],
    ids=lambda change: next(iter(change)),
)
def test_a_hash_changes_with_its_clip_and_with_the_cache(clip: ClipRequest, change: dict[str, Any]) -> None:
    before = sample_hashes({"codec": "c"}, [clip])
    assert sample_hashes({"codec": "c"}, [clip]) == before
    assert sample_hashes({"codec": "c"}, [replace(clip, **change)]) != before
    assert sample_hashes({"codec": "d"}, [clip]) != before


def test_a_hash_changes_with_its_file(clip: ClipRequest) -> None:
    by_time, by_content = sample_hashes({}, [clip]), sample_hashes({}, [clip], "content")
    os.utime(clip.path, ns=(1, 1))
    assert sample_hashes({}, [clip]) != by_time
    assert sample_hashes({}, [clip], "content") == by_content
    clip.path.write_bytes(b"CONTENT")
    assert sample_hashes({}, [clip], "content") != by_content
    clip.path.unlink()
    assert sample_hashes({}, [clip]) == sample_hashes({}, [clip], "content")


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
