"""Errors of a full device, by whatever library, and devices that answer no more."""

from __future__ import annotations

import pytest
import torch

from swifti2v.memory.device_errors import broken_devices, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_says_that_memory_is_at_an_end(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        ValueError("CUDA error: out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_card_in_use_that_answers_with_an_error_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken_devices() == []  # this process uses none
    asked: list[int] = []

    def synchronize(index: int) -> None:
        asked.append(index)
        if index == 2:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 100 * index)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert broken_devices() == [2]
    assert asked == [1, 2]  # the first one is not in use, and is not begun to be used by the question
