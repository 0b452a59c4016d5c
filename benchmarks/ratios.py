"""Two ways of doing one thing, timed in turn on one thread, and the tiny network of `benchmarks/speed.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 600,  # 4.67 times the width, as in the 5B
    "num_layers": 4,
    "text_dim": 64,
    "freq_dim": 256,
}
"""With 132 tokens a frame attention and linear layers share the work of a window as in the 5B at 2560x1408."""
ROWS, COLUMNS = 11 * 2, 12 * 2
TOKENS_PER_FRAME = (ROWS // 2) * (COLUMNS // 2)


@dataclass(frozen=True)
class Ratio:
    """Seconds of the way that is compared with, and of ours; `graphs` counts what was compiled for ours."""

    name: str
    other_seconds: float
    seconds: float
    goal: float
    graphs: int | None = None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.other_seconds / self.seconds


def best_seconds(run: Callable[[], object], *, repeats: int) -> float:
    """Return the least processor time of a few runs."""
    return least_seconds({"": run}, rounds=repeats)[""]


def least_seconds(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Return the least processor time of each way.

    They run in turn, so that a machine that slows down slows all of them, and every other round backwards, so that none
    always follows the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            started = time.thread_time()
            ways[name]()
            found[name].append(time.thread_time() - started)
    return {name: min(seconds) for name, seconds in found.items()}


def num_graphs() -> int:
    """Return how many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
