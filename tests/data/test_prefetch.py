"""Threads that work ahead: what they yield, how far they go, how they stop."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from swifti2v.data.prefetch import prefetched

if TYPE_CHECKING:
    from collections.abc import Generator


def count(start: int, length: int = 5) -> Generator[int, None, None]:
    yield from range(start, start + length)


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
def test_every_item_once_and_those_of_a_job_in_order(num_threads: int) -> None:
    found = list(prefetched((partial(count, 10 * job) for job in range(7)), num_threads=num_threads))
    assert sorted(found) == [10 * job + place for job in range(7) for place in range(5)]
    for job in range(7):
        assert [item for item in found if item // 10 == job] == list(count(10 * job))


def test_no_jobs() -> None:
    assert list(prefetched([], num_threads=2)) == []


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_an_exception_arrives(num_threads: int) -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        list(prefetched([failing], num_threads=num_threads))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_go_no_further_than_an_item_each(num_threads: int) -> None:
    made: list[int] = []

    def job(number: int) -> Generator[int, None, None]:
        for place in range(20):
            made.append(place)
            yield 100 * number + place

    items = prefetched([partial(job, number) for number in range(num_threads)], num_threads=num_threads)
    for taken in range(1, 6):
        next(items)
        time.sleep(0.02)
        assert len(made) <= taken + num_threads
    items.close()


def test_work_goes_on_while_the_taker_is_busy() -> None:
    second_is_made = threading.Event()

    def job() -> Generator[int, None, None]:
        yield 1
        second_is_made.set()
        yield 2

    items = prefetched([job], num_threads=1)
    assert next(items) == 1
    assert second_is_made.wait(300)  # how long a failing test waits
    assert list(items) == [2]


def test_closing_stops_the_threads_and_closes_the_jobs() -> None:
    closed = threading.Event()

    def job() -> Generator[int, None, None]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    before = set(threading.enumerate())
    items = prefetched([job], num_threads=1)
    assert next(items) == 0
    items.close()
    assert closed.is_set()
    assert set(threading.enumerate()) <= before
