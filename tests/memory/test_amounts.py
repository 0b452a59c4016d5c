"""Amounts of memory, written and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.memory.amounts import GIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("24GB", 24 * 10**9), ("1.5 gib", 3 * GIB // 2), ("500MiB", 500 * 2**20), ("24", 24 * GIB)],
)
def test_amounts_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["24B", "lots", "-1GiB"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="write for instance 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "nearest", "enough"),
    [
        (0, "0.0 MiB", "0.0 MiB"),
        (1, "0.0 MiB", "0.1 MiB"),
        (10 * MIB, "10.0 MiB", "10.0 MiB"),
        (10 * MIB + 1, "10.0 MiB", "10.1 MiB"),
        (GIB - 1, "1.0 GiB", "1.0 GiB"),
        (GIB, "1.0 GiB", "1.0 GiB"),
        (GIB + 1, "1.0 GiB", "1.1 GiB"),
        (1023 * MIB, "1023.0 MiB", "1023.0 MiB"),
        (int(23.16 * GIB), "23.2 GiB", "23.2 GiB"),
    ],
)
def test_amounts_are_written_in_the_unit_that_shows_them(num_bytes: int, nearest: str, enough: str) -> None:
    assert format_bytes(num_bytes) == nearest
    assert format_bytes(num_bytes, rounds_up=True) == enough


@given(st.integers(0, 2**42), st.sampled_from([1, 2]))
def test_what_is_written_can_be_given_back(num_bytes: int, decimals: int) -> None:
    unit = GIB if num_bytes >= GIB - MIB else MIB
    enough = parse_bytes(format_bytes(num_bytes, decimals=decimals, rounds_up=True))
    nearest = parse_bytes(format_bytes(num_bytes, decimals=decimals))
    assert num_bytes - 1 <= enough <= num_bytes + unit / 10**decimals + 1
    assert abs(nearest - num_bytes) <= unit / 10**decimals / 2 + 1
