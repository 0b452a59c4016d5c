"""What a device says when its memory is at an end, or the device itself; PyTorch is not imported for it."""

from __future__ import annotations

import sys
from typing import Any

FULL_DEVICE = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",
)
"""Words of a `RuntimeError` where the driver, cuBLAS or cuDNN found no memory of their own, which PyTorch's allocator
does not give them: for a handle in a new thread, a kernel's code, pinned host memory, or (the last) the workspace of
every convolution that cuDNN knows for a shape. PyTorch issues 128601 and 108645."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no more memory.

    The words of `FULL_DEVICE` may have other causes, a library that does not know the card for instance; whoever tries
    again should name the error if that does not help.
    """
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # an error of PyTorch's comes where it has been imported
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL_DEVICE)


def broken_devices() -> list[int]:
    """Return the CUDA devices in use that do not work any more, by number.

    After a fault (an illegal access, a memory cell, a card that fell off its bus) CUDA answers every call of the
    process with that error, whatever is asked; only a new process can use the card again.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    # Asked for one that is not in use, CUDA would begin to use it.
    in_use = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    return [index for index in in_use if not _answers(torch, index)]


def _answers(torch: Any, index: int) -> bool:
    try:
        torch.cuda.synchronize(index)
    except RuntimeError:
        return False
    return True
