"""What a step is made of: which samples, for which process, read while the step before it trains."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from swifti2v.training.engine.distributed import Processes

Batch = TypeVar("Batch")


class Sample(Protocol):
    """A sample of a cache; `data.latent_cache.CachedSample` is one."""

    @property
    def name(self) -> str:
        """Of the clip, for messages."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By the names that its encoder gave them."""


class Samples(Protocol):
    """Samples by index; `data.latent_cache.LatentCache` is one."""

    def __getitem__(self, index: int) -> Sample:
        """Return a sample."""


class Batches(Protocol):
    """Which samples make a batch; `data.batches.BucketBatches` of one process is one."""

    def batch_of(self, step: int) -> Sequence[int]:
        """Return indices of samples of one shape; a function of `step` only."""
        ...


class BatchesOfProcess:
    """Batches by the numbers that the loop counts, which run through all processes: each takes its own of a step.

    Args:
        batches: made with the `batch_rank` and `batch_count` of `processes`, so that all get samples of one shape at a
            time.
        processes: those of the loop.
    """

    def __init__(self, batches: Batches, processes: Processes) -> None:
        self._batches = batches
        self._count = processes.batch_count

    def batch_of(self, step: int) -> Sequence[int]:
        """Return the indices of batch number `step`."""
        return self._batches.batch_of(step // self._count)


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
