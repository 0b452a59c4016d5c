"""The file of keys, and the bucket of requests."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.serving.keys import KEY_PREFIX, KeyFile, RateLimiter, add_key, read_keys, remove_key

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_is_found_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "ann", max_active_jobs=3)
    assert key.startswith(KEY_PREFIX)
    assert len(key) > len(KEY_PREFIX) + 40
    (kept,) = json.loads(path.read_text())["keys"]
    assert kept["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    found = KeyFile(path).find(key)
    assert found is not None
    assert (found.name, found.max_active_jobs) == ("ann", 3)
    assert KeyFile(path).find(key + "x") is None
    assert KeyFile(path).find("\ud800") is None


def test_removing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = [add_key(path, name) for name in ("ann", "bob")]
    file = KeyFile(path)
    remove_key(path, "ann")
    assert [file.find(key) is None for key in keys] == [True, False]
    assert [key.name for key in read_keys(path)] == ["bob"]
    with pytest.raises(InvalidInputError, match="the names are: bob"):
        remove_key(path, "ann")


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="add-key"):
        KeyFile(tmp_path / "keys.json")


def test_the_bucket_fills_evenly() -> None:
    now = 0.0
    limiter = RateLimiter(lambda: now)
    assert [limiter.take("ann", 6) for _ in range(6)] == [0.0] * 6
    assert limiter.take("ann", 6) == pytest.approx(10.0)
    assert limiter.take("bob", 6) == 0.0
    now = 9.0
    assert limiter.take("ann", 6) == pytest.approx(1.0)
    now = 10.0
    assert limiter.take("ann", 6) == 0.0
    assert limiter.take("ann", 6) > 0
    now = 1000.0
    assert [limiter.take("ann", 6) > 0 for _ in range(7)] == [False] * 6 + [True]
