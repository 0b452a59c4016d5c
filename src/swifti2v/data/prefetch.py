"""Threads that work ahead of whoever takes their results: decoding goes on while the encoder runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")
Job = Callable[[], Generator[T, None, None]]


def prefetched(jobs: Iterable[Job[T]], *, num_threads: int) -> Generator[T, None, None]:
    """Yield what the jobs yield; the items of one job in order, those of different jobs as they come.

    Each thread runs one job at a time. At most `num_threads` items are being made or wait to be taken. A job that
    raises ends the iteration with its exception. Closing the iterator stops and joins the threads.

    Args:
        jobs: taken one by one as threads become free.
        num_threads: 0 runs the jobs here, one after the other.
    """
    if num_threads == 0:
        for job in jobs:
            with closing(job()) as items:
                yield from items
        return
    with closing(_Crew(jobs, num_threads)) as crew:
        yield from crew.results()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Finished:
    pass


class _Crew(Generic[T]):
    """Threads, the queue that they fill, and the permits without which they make no further item."""

    def __init__(self, jobs: Iterable[Job[T]], num_threads: int) -> None:
        self._jobs = iter(jobs)
        self._taking = threading.Lock()
        self._stopped = threading.Event()
        self._permits = threading.Semaphore(num_threads)
        self._queue: queue.SimpleQueue[T | _Failure | _Finished] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def results(self) -> Iterator[T]:
        running = len(self._threads)
        while running:
            item = self._queue.get()
            if isinstance(item, _Finished):
                running -= 1
            elif isinstance(item, _Failure):
                raise item.error
            else:
                self._permits.release()
                yield item
                del item  # or it would live on while the next is waited for

    def close(self) -> None:
        self._stopped.set()
        for _ in self._threads:
            self._permits.release()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                with closing(job()) as items:
                    self._make(items)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that takes the results
            self._queue.put(_Failure(error))
        else:
            self._queue.put(_Finished())

    def _next_job(self) -> Job[T] | None:
        with self._taking:
            return None if self._stopped.is_set() else next(self._jobs, None)

    def _make(self, items: Iterator[T]) -> None:
        while True:
            self._permits.acquire()
            if self._stopped.is_set():
                return
            try:
                self._queue.put(next(items))
            except StopIteration:
                self._permits.release()
                return
