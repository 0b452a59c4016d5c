"""Work ahead of its reader, in a thread of its own: the next segment is denoised while one is decoded and written.

The thread is one item ahead and no more, so that memory holds one segment beyond what a run without the thread holds.
What the producer reports (progress) is called in the reader's thread, where callers expect their callbacks, and an
error of either side ends both.
"""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from swifti2v.wan.streaming import VideoDecoder

Event = TypeVar("Event")

Overlap = Literal["decode", "write", "none"]
"""What runs beside the denoising of the next segment: `decode`: decoding the segment before and reading its frames;
`write`: reading the frames only, which takes no more memory of the device; `none`: nothing."""

THREAD_NAME = "swifti2v-ahead"

_outbox: ContextVar[Callable[[Callable[[], None]], None] | None] = ContextVar("outbox", default=None)
"""In a thread of `made_ahead`: hands a call over to the reader's thread."""


def decoder_ahead(decoder: VideoDecoder, overlap: Overlap, device: torch.device) -> VideoDecoder:
    """Return a decoder that does the same while what makes its latents (Stage II) goes on in a thread."""
    return decoder if overlap == "none" else _DecoderAhead(decoder, overlap, device)


def in_readers_thread(callback: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return `callback` to be called anywhere: from a thread of `made_ahead`, the call is made in its reader's."""

    def call(event: Event) -> None:
        outbox = _outbox.get()
        if outbox is None:
            callback(event)
        else:
            outbox(partial(callback, event))

    return call


@dataclass(frozen=True)
class _DecoderAhead:
    decoder: VideoDecoder
    overlap: Overlap
    device: torch.device

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        if self.overlap == "write":
            yield from made_ahead(self.decoder.decode_stream(latents), device=self.device)
            return
        with closing(made_ahead(latents, device=self.device)) as ahead:
            yield from self.decoder.decode_stream(ahead)


@dataclass(frozen=True)
class _Item:
    tensor: Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class _Call:
    function: Callable[[], None]


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class _ReaderLeft(BaseException):
    """The reader closed its side while the producer was at work."""


def made_ahead(items: Iterable[Tensor], *, device: torch.device) -> Generator[Tensor, None, None]:
    """Yield `items`, made in a thread at most one item ahead of the reader.

    Args:
        items: iterated over in the thread. Callbacks made by `in_readers_thread` reach the reader's thread in order, at
            the latest when the reader next asks for an item; one that raises, for instance `GenerationCancelled`, ends
            the producer at its next callback or item. So does a reader that has left.
        device: on a CUDA device the producer works on a stream of its own.

    Yields:
        The items, in their order. Whoever stops early should close the generator: it waits until the producer has
        come to its next callback or item, and has closed what it iterates over.

    Raises:
        BaseException: what the producer raised, when the items before it have been read.
    """
    messages: queue.SimpleQueue[_Item | _Call | _End] = queue.SimpleQueue()
    has_left = threading.Event()
    may_go_on = threading.Semaphore(1)
    # In a copy of this context: settings of `torch.compile` (how many graphs a block may have) are variables of it.
    thread = threading.Thread(
        target=copy_context().run,
        args=(_work, items, messages, may_go_on, has_left, _recorded(device), device),
        name=THREAD_NAME,
        daemon=True,
    )
    del items  # or what was read of it would live on with this generator
    thread.start()
    try:
        while not isinstance(message := messages.get(), _End):
            if isinstance(message, _Call):
                message.function()
                continue
            tensor = _received(message)
            del message
            may_go_on.release()
            yield tensor
            del tensor  # or it would live on while the reader waits for the next one
        if message.error is not None:
            raise message.error
    finally:
        has_left.set()
        may_go_on.release()
        thread.join()
        # An error holds the frames that it passed, and they what they had on the device; a name for it in one of them
        # would close a circle, and a run that goes on after an out-of-memory needs that memory.
        message = None  # type: ignore[assignment]


def _work(
    source: Iterable[Tensor],
    messages: queue.SimpleQueue[_Item | _Call | _End],
    may_go_on: threading.Semaphore,
    has_left: threading.Event,
    before: torch.cuda.Event | None,
    device: torch.device,
) -> None:
    def check() -> None:
        if has_left.is_set():
            raise _ReaderLeft

    def hand_over(function: Callable[[], None]) -> None:
        check()
        messages.put(_Call(function))

    def items() -> Generator[Tensor, None, None]:
        yield from source

    _outbox.set(hand_over)
    error: BaseException | None = None
    try:
        # Gradients are a setting of the thread: whoever switched them off did so for the reader.
        with torch.no_grad(), _own_stream(device, before), closing(items()) as produced:
            while True:
                may_go_on.acquire()
                check()
                item = next(produced, None)
                if item is None:
                    break
                messages.put(_Item(item, _recorded(device)))
                del item
    except _ReaderLeft:
        pass
    except BaseException as raised:  # noqa: BLE001 - it is the reader's to handle
        error = raised
    messages.put(_End(error))
    error = None  # see the end of `made_ahead`


@contextmanager
def _own_stream(device: torch.device, before: torch.cuda.Event | None) -> Iterator[None]:
    """Work on another CUDA stream, after what the reader had queued; nothing on other devices."""
    with ExitStack() as held:
        if before is not None:
            held.enter_context(torch.cuda.device(device))
            stream = _stream(torch.cuda.current_device())
            stream.wait_event(before)
            held.enter_context(torch.cuda.stream(stream))
        yield


@lru_cache
def _stream(device_index: int) -> torch.cuda.Stream:
    """Return the stream of a card for work ahead: always the same, because freed memory is kept for its stream."""
    return torch.cuda.Stream(device_index)  # type: ignore[no-untyped-call]


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at the end of what the thread has queued on a CUDA device so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _received(item: _Item) -> Tensor:
    """Return the tensor, after which the reader's stream waits until it is there."""
    if item.ready is not None and item.tensor.is_cuda:
        stream = torch.cuda.current_stream(item.tensor.device)
        stream.wait_event(item.ready)
        item.tensor.record_stream(stream)
    return item.tensor
