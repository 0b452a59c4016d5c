"""Signals as requests: the first asks, the second acts, and handlers are put back."""

from __future__ import annotations

import os
import signal

import pytest

from swifti2v.training.engine.interruption import SIGNALS, interruption_as_request


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    asked = []
    # Who starts the tests in the background may have told them to ignore Ctrl-C.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted_twice() -> None:
        with interruption_as_request(lambda: asked.append(1)):
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [1]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    signal.signal(signal.SIGINT, former)
    assert asked == [1]


def test_handlers_are_put_back_however_it_ends() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def failing() -> None:
        with interruption_as_request(lambda: None):
            assert signal.getsignal(signal.SIGTERM) != before[1]
            raise ValueError("other")

    with pytest.raises(ValueError, match="other"):
        failing()
    assert [signal.getsignal(number) for number in SIGNALS] == before
