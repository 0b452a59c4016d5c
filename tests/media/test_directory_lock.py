"""One run at a time works in a directory, and a killed one does not leave it locked."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest

from swifti2v.errors import OutputError, WorkDirectoryError
from swifti2v.media.directory_lock import directory_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import signal, sys
from pathlib import Path
from swifti2v.media.directory_lock import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with directory_lock(tmp_path), pytest.raises(WorkDirectoryError), directory_lock(tmp_path):
        pass
    with directory_lock(tmp_path):
        pass


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WorkDirectoryError), directory_lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with directory_lock(tmp_path):
        pass


def test_a_directory_that_is_not_there_is_an_error_of_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError), directory_lock(tmp_path / "missing"):
        pass


def test_a_file_system_without_locks_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_arguments: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory_lock(tmp_path):
        pass
