"""The comparison sees what differs; the runs themselves are the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_numbers import ROOT, Tree, compare, kept_in

if TYPE_CHECKING:
    from pathlib import Path


def test_one_number_that_differs_is_found() -> None:
    old = {"frames": np.zeros((2, 4, 4, 3), np.uint8), "motion": np.ones(3), "gone": np.ones(1)}
    new = {"frames": np.zeros((2, 4, 4, 3), np.uint8), "motion": np.ones(3), "short": np.ones(2)}
    new["motion"][1] += 0.5
    found = compare(old, new)
    assert found["frames"] is None
    assert "0.5" in (found["motion"] or "")
    assert found["gone"] is not None
    assert found["short"] is not None
    assert compare({"frames": np.zeros(4)}, {"frames": np.zeros(5)})["frames"] is not None


def test_what_a_run_keeps_is_read(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / "a" / "motion_reference").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "a" / "motion_reference" / f"piece_{index:06d}.npy", np.full((2, 3), index, np.uint8))
        save_file({"targets": torch.full((2,), index + 0.5)}, tmp_path / "a" / f"segment_{index:04d}.safetensors")
    found = kept_in(tmp_path)
    np.testing.assert_array_equal(found["motion reference"], [[0] * 3] * 2 + [[1] * 3] * 2)
    np.testing.assert_array_equal(found["segment 1"], [1.5, 1.5])


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-command"):
        Tree(ROOT, tmp_path).run("no-such-command")
