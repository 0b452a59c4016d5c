"""Worker processes beside the service: started, started again when they die, and ended in good order."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Sequence

LOGGER = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0


class WorkerProcesses:
    """Keeps `count` processes of `command` alive.

    Each is given a pipe as standard input, which closes when this process dies, however it dies; a worker that is told
    to watch it (`swifti2v jobs work --stop-with-stdin`) is then not left behind.

    Args:
        command: of one worker; not run through a shell.
        count: how many.
    """

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command = list(command)
        self._count = count
        self._stopping = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher = threading.Thread(target=self._watch, name="workers", daemon=True)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of the processes."""
        return tuple(process.pid for process in self._processes)

    def start(self) -> None:
        """Start the processes."""
        self._processes = [self._start() for _ in range(self._count)]
        self._watcher.start()

    def stop(self, *, grace_seconds: float) -> None:
        """Ask the processes to end, by SIGTERM, and kill those that still live after the grace."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + grace_seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                LOGGER.warning("worker %d did not end in %g s and is killed", process.pid, grace_seconds)
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdin=subprocess.PIPE)  # noqa: S603 - our own command line

    def _watch(self) -> None:
        pause_seconds = 1.0
        while not self._stopping.wait(_LOOK_SECONDS):
            for place, process in enumerate(self._processes):
                if process.poll() is None:
                    continue
                LOGGER.error("worker %d ended with code %s; another is started", process.pid, process.returncode)
                if self._stopping.wait(pause_seconds):  # one that dies at once is not started in a circle
                    return
                pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
                if process.stdin is not None:
                    process.stdin.close()
                self._processes[place] = self._start()
