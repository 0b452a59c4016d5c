"""Memory of the process that is free but not given back to the system: glibc's habits with large blocks.

glibc keeps freed blocks below 32 MB in the heaps of all threads, where they scatter: at 2560x1408 that was 0.65 of
2.3 GiB when the network begins (`docs/log.md`). Where the C library is not glibc both functions do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

M_MMAP_THRESHOLD = -3
"""`mallopt`'s name of the size from which a block is mapped on its own (malloc.h)."""
LARGE_BLOCK_BYTES = 4 * 2**20


def trim_heap() -> None:
    """Give freed memory back to the system; takes milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def map_large_blocks() -> None:
    """Let every block of 4 MiB and more go back to the system as soon as it is freed, for the life of the process.

    For programs, not for libraries: it changes how the whole process allocates.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
