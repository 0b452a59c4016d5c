"""How fast a run is: amounts of work per second, and the share of the device's arithmetic that they use (MFU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

AMOUNTS = ("samples", "tokens", "tflop")
"""Numbers of an objective that are work, not quality: they are summed over processes and divided by the time."""

# Dense bfloat16 with float32 accumulation, as the makers' data sheets give it; the first name that fits counts.
PEAK_TFLOP_PER_SECOND: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_tflop_per_second(device: torch.device) -> float | None:
    """Peak of one device in bfloat16; None where it is not known (CPUs, other cards)."""
    if device.type != "cuda":
        return None
    return peak_of_card(torch.cuda.get_device_name(device))


def peak_of_card(name: str) -> float | None:
    """Peak of a card by the name that its driver gives, for instance "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((peak for card, peak in PEAK_TFLOP_PER_SECOND if card in name), None)


def rates(amounts: Mapping[str, float], *, seconds: float, peak: float | None) -> dict[str, float]:
    """Return "samples_per_second" and so on, and "mfu" where TFLOP and the peak are known.

    Args:
        amounts: of `AMOUNTS`, of all processes together.
        seconds: in which they were done.
        peak: TFLOP per second of all devices together.
    """
    found = {f"{name}_per_second": amount / seconds for name, amount in amounts.items()}
    if peak is not None and "tflop" in amounts:
        found["mfu"] = amounts["tflop"] / seconds / peak
    return found
