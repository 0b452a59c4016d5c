"""Freed memory goes back to the system."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from swifti2v.memory import heap

STATUS = Path("/proc/self/status")
needs_glibc = pytest.mark.skipif(not STATUS.exists() or heap._glibc() is None, reason="needs Linux with glibc")


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@needs_glibc
def test_scattered_free_blocks_are_given_back():
    blocks = [bytearray(b"x") * 100_000 for _ in range(2_000)]
    kept = blocks[::50]
    del blocks
    before = resident_bytes()
    heap.trim_heap()
    assert len(kept) == 40
    assert resident_bytes() < before - 100_000_000


# Blocks of 20 MB freed in front of one that stays: on a heap they remain, mapped one by one they go.
SCATTER = """
import re, sys
from pathlib import Path
from swifti2v.memory import heap
if sys.argv[1] == "mapped":
    heap.map_large_blocks()
first = bytearray(33_000_000); del first  # glibc learns from this to keep blocks up to 32 MB on its heap
blocks, kept = [], []
for _ in range(10):
    blocks.append(bytearray(b"x") * 20_000_000)
    kept.append(bytearray(b"x") * 100_000)
del blocks
print(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@needs_glibc
def test_large_blocks_go_back_when_they_are_freed():
    def resident_kibibytes(mode: str) -> int:
        command = [sys.executable, "-c", SCATTER, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603 - our own words

    assert resident_kibibytes("mapped") < resident_kibibytes("usual") - 100_000


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.trim_heap()
    heap.map_large_blocks()
