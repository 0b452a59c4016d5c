"""Properties of the order of batches, over random sizes of buckets, batches and worlds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.data.batches import BucketBatches
from swifti2v.errors import InvalidInputError


@dataclass(frozen=True)
class Buckets:
    buckets: dict[str, tuple[int, ...]] = field(default_factory=dict)


def buckets_of(sizes: list[int]) -> Buckets:
    buckets, start = {}, 0
    for size in sizes:
        buckets[f"{start}x{size}"] = tuple(range(start, start + size))
        start += size
    return Buckets(buckets)


shapes = st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(any)
seeds = st.integers(0, 2**31)
worlds = st.integers(1, 4)
batch_sizes = st.integers(1, 5)


def epoch(cache: Buckets, batch_size: int, seed: int, world_size: int, number: int = 0) -> list[list[list[int]]]:
    """Batches of an epoch: by step, then by rank."""
    ranks = [BucketBatches(cache, batch_size, seed, rank, world_size) for rank in range(world_size)]
    length = ranks[0].batches_per_epoch
    return [[rank.batch_of(number * length + step) for rank in ranks] for step in range(length)]


@settings(deadline=None)
@given(shapes, batch_sizes, seeds, worlds, st.integers(0, 3))
def test_an_epoch(sizes: list[int], batch_size: int, seed: int, world_size: int, number: int) -> None:
    cache = buckets_of(sizes)
    steps = epoch(cache, batch_size, seed, world_size, number)
    counts = Counter(index for step in steps for batch in step for index in batch)
    assert set(counts) == set(range(sum(sizes)))
    for indices in cache.buckets.values():
        extra = sum(counts[index] - 1 for index in indices)
        assert extra == -len(indices) % world_size  # only what makes the ranks equal comes again
    for step in steps:
        assert len({len(batch) for batch in step}) == 1
        assert 1 <= len(step[0]) <= batch_size
        bucket = {name for name, indices in cache.buckets.items() for batch in step if set(batch) & set(indices)}
        assert len(bucket) == 1


@settings(deadline=None)
@given(shapes, batch_sizes, seeds, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_only(sizes: list[int], batch_size: int, seed: int, asked: list[int]) -> None:
    cache = buckets_of(sizes)
    in_turn = BucketBatches(cache, batch_size, seed)
    expected = [in_turn.batch_of(step) for step in range(61)]
    jumping = BucketBatches(cache, batch_size, seed)
    assert [jumping.batch_of(step) for step in asked] == [expected[step] for step in asked]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), seeds, worlds)
def test_ranks_together_see_what_one_process_sees(
    quarters: list[int], batch_size: int, seed: int, world_size: int
) -> None:
    cache = buckets_of([size * world_size for size in quarters])
    together = epoch(cache, batch_size, seed, world_size)
    alone = epoch(cache, batch_size * world_size, seed, 1)
    assert [[index for batch in step for index in batch] for step in together] == [step[0] for step in alone]


def test_epochs_and_seeds_differ() -> None:
    cache = buckets_of([40])
    orders = {
        tuple(index for step in epoch(cache, 4, seed, 1, number) for index in step[0])
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9


def test_every_place_is_as_likely() -> None:
    """Sample 0 of 8 in 400 epochs: 50 times in each place, give or take (chi-squared, 7 degrees, p = 1e-4)."""
    batches = BucketBatches(buckets_of([8]), 1, 5)
    places = Counter(step % 8 for step in range(3200) if batches.batch_of(step) == [0])
    assert sum((places[place] - 50) ** 2 / 50 for place in range(8)) < 29.9


def test_the_order_is_this_one_for_ever() -> None:
    """A run that goes on with a later version must meet the same batches; the numbers are blake2b's."""
    import hashlib

    def key(what: str, number: int) -> bytes:
        return hashlib.blake2b(f"7/0/{what}/{number}".encode(), digest_size=12).digest()

    batches = BucketBatches(Buckets({"a": (0, 1, 2, 3, 4)}), 1, 7)
    samples = sorted(range(5), key=lambda index: key("a", index))
    expected = [samples[place] for place in sorted(range(5), key=lambda place: key("", place))]
    assert [batches.batch_of(step)[0] for step in range(5)] == expected


def test_an_epoch_has_a_rest_in_each_bucket() -> None:
    assert BucketBatches(buckets_of([5, 3]), 2, 0).batches_per_epoch == 3 + 2


@pytest.mark.parametrize(
    "arguments", [(0, 0, 0, 1), (1, 0, 0, 0), (1, 0, 1, 1), (1, 0, -1, 2)], ids=["batch", "world", "rank", "negative"]
)
def test_wrong_sizes(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidInputError):
        BucketBatches(buckets_of([3]), *arguments)


def test_nothing_to_make_batches_of() -> None:
    with pytest.raises(InvalidInputError, match="no samples"):
        BucketBatches(buckets_of([0]), 1, 0)
    with pytest.raises(InvalidInputError, match="below 0"):
        BucketBatches(buckets_of([3]), 1, 0).batch_of(-1)
