"""Threads that work on frames ahead of whoever reads them, in order and a bounded number at a time."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8


def worker_count(wanted: int) -> int:
    """Return `wanted`, or for 0 one worker per CPU core, at most `MOST_WORKERS`."""
    return wanted or min(os.cpu_count() or 1, MOST_WORKERS)


def ahead(function: Callable[[Item], Result], items: Iterator[Item], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` in order, computed by threads at most ``workers + 1`` items ahead of the consumer."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="reference") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def on_this_stream(function: Callable[[Item], Result], device: torch.device) -> Callable[[Item], Result]:
    """Return `function` to be called in other threads, its CUDA work in the order of this thread's stream.

    The current stream belongs to a thread. Pool threads would work on the default one, and nothing would order that
    behind, or before, the stream of whoever reads their results.
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.current_stream(device)

    def called(item: Item) -> Result:
        with torch.cuda.stream(stream):
            return function(item)

    return called
