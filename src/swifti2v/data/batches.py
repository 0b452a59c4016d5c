"""The order of batches, as a function of seed and step: nothing to save, nothing to restore when a run goes on.

Within an epoch every sample comes once. A batch holds samples of one bucket, and all ranks get the same number of them
at every step, from the same bucket. What depends on chance is decided by hashes, so that it is the same with every
version of every library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from swifti2v.errors import InvalidInputError


class Bucketed(Protocol):
    """Something whose samples fall into buckets: a `LatentCache`."""

    @property
    def buckets(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the samples of each bucket."""
        ...


@dataclass(frozen=True)
class _Epoch:
    number: int
    batches: tuple[tuple[int, ...], ...]  # of all ranks together


class BucketBatches:
    """Batches of `batch_size` samples of one bucket for each rank.

    The samples of a bucket that do not fill a batch of all ranks make a smaller one at its end; where they do not
    divide by the number of ranks, the first of the bucket's order come a second time, fewer than there are ranks.
    With `world_size` 2 and `batch_size` 1 the ranks together see what one process sees with `batch_size` 2.

    Args:
        cache: gives the buckets.
        batch_size: samples of a batch on each rank.
        seed: of the order.
        rank: of this process, from 0.
        world_size: number of processes that share the data.

    Raises:
        InvalidInputError: a size that is not positive, a rank that is not one of them, or no samples at all.
    """

    def __init__(self, cache: Bucketed, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            msg = (
                f"batch size {batch_size} and world size {world_size} must be above 0, and rank {rank} below the latter"
            )
            raise InvalidInputError(msg)
        self._buckets = {name: tuple(indices) for name, indices in cache.buckets.items() if indices}
        if not self._buckets:
            msg = "there are no samples to make batches of; check the data with `swifti2v data check`"
            raise InvalidInputError(msg)
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._global_size = batch_size * world_size
        self._epoch: _Epoch | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Steps in which every sample comes once; the same for every epoch."""
        return sum(-(-len(indices) // self._global_size) for indices in self._buckets.values())

    def batch_of(self, step: int) -> list[int]:
        """Return the indices of this rank's batch at `step`, from 0; a function of the arguments and the step alone."""
        if step < 0:
            msg = f"step {step} is below 0; count from 0"
            raise InvalidInputError(msg)
        number, place = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch.number != number:  # kept, because steps come one after the other
            self._epoch = _Epoch(number, self._batches(number))
        batch = self._epoch.batches[place]
        share = len(batch) // self._world_size
        return list(batch[self._rank * share : (self._rank + 1) * share])

    def _batches(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        batches: list[tuple[int, ...]] = []
        for bucket, indices in sorted(self._buckets.items()):
            order = self._shuffled(indices, f"{epoch}/{bucket}")
            missing = -len(order) % self._world_size
            order += [order[place % len(indices)] for place in range(missing)]
            batches.extend(
                tuple(order[start : start + self._global_size]) for start in range(0, len(order), self._global_size)
            )
        return tuple(batches[place] for place in self._shuffled(range(len(batches)), f"{epoch}/"))

    def _shuffled(self, numbers: Iterable[int], what: str) -> list[int]:
        def key(number: int) -> bytes:
            return hashlib.blake2b(f"{self._seed}/{what}/{number}".encode(), digest_size=12).digest()

        return sorted(numbers, key=key)
