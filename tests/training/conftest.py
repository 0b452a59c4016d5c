"""What the tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _loud_libraries(loud_libraries: None) -> None:
    """Every test here may run a command, which silences the libraries."""
