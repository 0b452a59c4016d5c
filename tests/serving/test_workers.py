"""Processes beside the service: replaced when they die, ended in good order, killed only when they must be."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from swifti2v.serving.workers import WorkerProcesses
from tests.jobs.conftest import wait_for

if TYPE_CHECKING:
    from pathlib import Path

DEAF = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); signal.pause()"
WAITING = "import sys; sys.stdin.buffer.read()"


def test_a_dead_worker_is_replaced_and_all_end() -> None:
    workers = WorkerProcesses([sys.executable, "-S", "-c", WAITING], 2)
    workers.start()
    first, second = workers.process_ids
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: workers.process_ids[0] != first)
    assert workers.process_ids[1] == second
    last = workers.process_ids
    workers.stop(grace_seconds=10)
    for number in last:
        assert not os.path.exists(f"/proc/{number}/fd"), "it has ended and was waited for"  # noqa: PTH110 - a process


def test_a_deaf_worker_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    workers = WorkerProcesses([sys.executable, "-S", "-c", DEAF, str(ready)], 1)
    workers.start()
    wait_for(ready.exists)
    (number,) = workers.process_ids
    workers.stop(grace_seconds=0.1)
    assert not os.path.exists(f"/proc/{number}/fd")  # noqa: PTH110 - as above
