"""What a run may take of device and host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from swifti2v.memory.amounts import parse_bytes
from swifti2v.memory.plan import CONTEXT_BYTES


@dataclass(frozen=True)
class MemoryLimits:
    """What a run may take.

    Args:
        device_bytes: of the device; None: no limit.
        host_bytes: of the host; None: no limit.
        is_automatic: `device_bytes` is to be what is free on the device, once it is known which.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    is_automatic: bool = False

    @classmethod
    def parse(cls, device: str, host: str | None = None) -> Self:
        """Read ``24GiB`` and the like; ``auto`` is what is free on the CUDA device, no limit on another.

        Raises:
            InvalidInputError: an amount has another form.
        """
        is_automatic = device == "auto"
        limit = None if is_automatic else parse_bytes(device)
        return cls(limit, None if host is None else parse_bytes(host), is_automatic)

    def on(self, device: torch.device) -> MemoryLimits:
        """Return the limits in bytes, read off `device` now where they are automatic."""
        if not self.is_automatic:
            return self
        if device.type != "cuda":
            return MemoryLimits(None, self.host_bytes)
        torch.cuda.empty_cache()  # what PyTorch keeps of networks that are gone counts as taken otherwise
        # Plans keep bytes for the driver's own, and those are taken already.
        return MemoryLimits(torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES, self.host_bytes)
