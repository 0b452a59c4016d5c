"""The peak memory of a child process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import memory
from benchmarks.memory import run_child

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.memory import ChildRun

MEBIBYTE = 2**20


def allocating(mebibytes: int, seen: Path) -> list[str]:
    """A command that holds a block for a moment, and ends when its peak was `seen`."""
    program = (
        f"import os, time; block = b'1' * ({mebibytes} * {MEBIBYTE}); del block\n"
        f"while not os.path.exists({str(seen)!r}): time.sleep(0.01)\n"
        "print('done')"
    )
    return [sys.executable, "-S", "-c", program]


def test_the_peak_is_that_of_each_child_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller child comes second, and this process, which holds torch, is larger than either."""
    pytest.importorskip("torch")
    read = memory.high_water_bytes

    def measured(mebibytes: int) -> ChildRun:
        seen = tmp_path / str(mebibytes)

        def reading(pid: int) -> int:
            peak = read(pid)
            if peak >= mebibytes * MEBIBYTE:
                seen.touch()
            return peak

        monkeypatch.setattr(memory, "high_water_bytes", reading)
        return run_child(allocating(mebibytes, seen))

    large, small = measured(150), measured(20)
    assert large.output == "done\n"
    assert 150 <= large.peak_bytes / MEBIBYTE < 200
    assert 20 <= small.peak_bytes / MEBIBYTE < 70


def test_a_failing_child_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: no such image"):
        run_child([sys.executable, "-S", "-c", "import sys; sys.stderr.write('no such image'); sys.exit(3)"])
