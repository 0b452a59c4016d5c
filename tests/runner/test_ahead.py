"""Work ahead of its reader: the same items, one ahead and no more, and an end that is clean on either side."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from swifti2v.errors import GenerationCancelled
from swifti2v.runner.ahead import THREAD_NAME, in_readers_thread, made_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

CPU = torch.device("cpu")
PATIENCE_SECONDS = 300
"""How long a failing test waits for what does not happen; a passing one never does."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}


class Producer:
    """Makes numbered items, telling of each before and after."""

    def __init__(self, count: int, *, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.num_begun = self.num_done = 0
        self.is_closed = False
        self.threads: set[str] = set()
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, notify: Callable[[int], None]) -> Iterator[torch.Tensor]:
        try:
            for number in range(self.count):
                self.num_begun += 1
                self.threads.add(threading.current_thread().name)
                notify(number)
                if number == self.fails_at:
                    raise torch.OutOfMemoryError("full")
                item = torch.full((2,), float(number))
                self.alive.append(weakref.ref(item))
                self.num_done += 1
                yield item
                del item
        finally:
            self.is_closed = True


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def started(producer: Producer, on_event: Callable[[int], None] = lambda _number: None) -> Generator[torch.Tensor]:
    return made_ahead(producer(in_readers_thread(on_event)), device=CPU)


def test_items_and_events_keep_their_order_and_events_come_in_the_readers_thread() -> None:
    producer, events, threads = Producer(6), [], set()

    def on_event(number: int) -> None:
        events.append(number)
        threads.add(threading.current_thread().name)

    assert [int(item[0]) for item in started(producer, on_event)] == list(range(6))
    assert events == list(range(6))
    assert threads == {threading.current_thread().name}
    assert producer.threads == {THREAD_NAME}
    assert producer.is_closed


def test_the_producer_is_one_item_ahead_and_no_more() -> None:
    producer = Producer(5)
    items = started(producer)
    for number in range(4):
        next(items)
        until(lambda number=number: producer.num_done == number + 2)  # it works while the reader does
        time.sleep(0.01)
        assert producer.num_begun == number + 2
        assert sum(each() is not None for each in producer.alive) <= 2
    items.close()


def test_nothing_is_begun_before_it_is_asked_for() -> None:
    producer = Producer(2)
    started(producer).close()
    assert producer.num_begun == 0


def test_an_error_comes_after_the_items_before_it() -> None:
    producer, seen = Producer(5, fails_at=2), []
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        seen.extend(int(item[0]) for item in started(producer))
    assert producer.is_closed
    assert producer.num_done == 2


def test_a_reader_that_stops_early_ends_the_producer() -> None:
    producer = Producer(100)
    items = started(producer)
    next(items)
    items.close()
    assert producer.is_closed
    assert producer.num_begun <= 2


def test_cancelling_from_an_event_ends_the_producer_at_its_next_one() -> None:
    producer = Producer(100)

    def cancel(number: int) -> None:
        if number == 1:
            raise GenerationCancelled("enough")

    seen = []
    with pytest.raises(GenerationCancelled, match="enough"):
        seen.extend(int(item[0]) for item in started(producer, cancel))
    assert producer.is_closed
    assert producer.num_begun <= 3


def test_gradients_stay_as_the_reader_has_them() -> None:
    seen = []

    def produce() -> Iterator[torch.Tensor]:
        seen.append(torch.is_grad_enabled())
        yield torch.ones(1)

    for _ in made_ahead(produce(), device=CPU):
        assert torch.is_grad_enabled()
    assert seen == [False]


def test_settings_of_the_reader_hold_in_the_thread() -> None:
    """Those of `torch.compile` are context variables: with its own, the thread would run most sizes uncompiled."""
    from torch import _dynamo

    with _dynamo.config.patch(recompile_limit=77):
        seen = []

        def produce() -> Iterator[torch.Tensor]:
            seen.append(_dynamo.config.recompile_limit)
            yield torch.ones(1)

        list(made_ahead(produce(), device=CPU))
    assert seen == [77]


def test_an_error_keeps_nothing_alive_once_it_is_handled() -> None:
    """What a failed attempt had on the device must be free for the next one, without waiting for the collector."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def produce() -> Iterator[torch.Tensor]:
        activation = torch.ones(1000)
        kept.append(weakref.ref(activation))
        yield torch.ones(1)
        raise torch.OutOfMemoryError(f"with {len(activation)}")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            list(made_ahead(produce(), device=CPU))
        del caught
        assert kept[0]() is None
    finally:
        gc.enable()


def test_producer_and_reader_work_at_the_same_time() -> None:
    """While the reader has an item, the producer is at the next one: they meet, which taking turns they never would."""
    count = 8
    meeting = threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def produce() -> Iterator[torch.Tensor]:
        for number in range(count):
            if number:
                meeting.wait()
            yield torch.full((1,), float(number))

    seen = []
    for item in made_ahead(produce(), device=CPU):
        seen.append(int(item))
        if len(seen) < count:
            meeting.wait()
    assert seen == list(range(count))
