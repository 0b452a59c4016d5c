"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re
from math import ceil

from swifti2v.errors import InvalidInputError

MIB = 2**20
GIB = 2**30


def parse_bytes(text: str) -> int:
    """Read ``24GiB``, ``24GB``, ``500MiB``, or ``24``, which are GiB; raise `InvalidInputError` for another form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([GM])(i?)B)?\s*", text, re.IGNORECASE)
    if match is None:
        msg = f"memory {text!r} is not an amount; write for instance 24GiB"
        raise InvalidInputError(msg, param="memory", value=text)
    if match[2] is None:
        return int(float(match[1]) * GIB)
    power = 3 if match[2].upper() == "G" else 2
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def format_bytes(num_bytes: int, *, decimals: int = 1, rounds_up: bool = False) -> str:
    """Write an amount in GiB, below 1 GiB in MiB: ``23.2 GiB``, ``10.0 MiB``; `parse_bytes` reads it.

    Args:
        num_bytes: at least 0.
        decimals: digits after the point.
        rounds_up: to the next such number, so that what is named is enough; else to the nearest.
    """
    scale: int = 10**decimals

    def rounded(unit: int) -> float:
        exact = num_bytes * scale / unit
        return (ceil(exact) if rounds_up else round(exact)) / scale

    if rounded(MIB) < 1024:
        return f"{rounded(MIB):.{decimals}f} MiB"
    return f"{rounded(GIB):.{decimals}f} GiB"
