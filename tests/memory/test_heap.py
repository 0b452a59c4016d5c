"""Freed memory goes back to the system."""

import re
from pathlib import Path

import pytest

from swifti2v.memory import heap

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not STATUS.exists() or heap._glibc_trim() is None, reason="needs Linux with glibc")
def test_scattered_free_blocks_are_given_back():
    blocks = [bytearray(b"x") * 100_000 for _ in range(2_000)]
    kept = blocks[::50]
    del blocks
    before = resident_bytes()
    heap.trim_heap()
    assert len(kept) == 40
    assert resident_bytes() < before - 100_000_000


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc_trim", lambda: None)
    heap.trim_heap()
