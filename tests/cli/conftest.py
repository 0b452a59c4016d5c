"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from swifti2v.cli import progress


@pytest.fixture(autouse=True)
def _loud_libraries(loud_libraries: None) -> None:
    """Every test here may run a command, which silences the libraries."""


@pytest.fixture(autouse=True)
def _no_progress_lines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave standard error to what else is said; `test_progress` tests the lines."""
    if request.module.__name__.rpartition(".")[2] != "test_progress":
        monkeypatch.setattr(progress, "_Lines", lambda: None)
