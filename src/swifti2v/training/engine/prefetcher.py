"""The next batch, made while this one trains."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Make the next batch in a thread while this one trains; a batch depends on its number only."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: dict[int, Future[Batch]] = {}
        self._last: int | None = None

    def take(self, step: int) -> Batch:
        """Return the batch of `step` and begin the next, as far on as this one is from the last."""
        stride = step - self._last if self._last is not None and step > self._last else 1
        self._last = step
        # This one too is made in the thread: `make` is never called twice at a time.
        current = self._pending.pop(step, None) or self._executor.submit(self._make, step)
        self._pending = {step + stride: self._executor.submit(self._make, step + stride)}
        return current.result()
