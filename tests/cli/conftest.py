"""What the tests of the commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _loud_libraries() -> Iterator[None]:
    """Give the libraries back the voice that the commands take from them."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    kept = [library.get_verbosity() for library in libraries]
    yield
    for library, verbosity in zip(libraries, kept, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()
