"""The command, in a process that torchrun starts on a machine without cards: there, two processes share the work.

diffusers 0.42 takes the rank modulo the number of accelerators, and a CPU counts as none. The process whose rank is in
``FAILING_RANK`` fails in the middle of its run.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch

from swifti2v.cli.main import main
from swifti2v.errors import MemoryBudgetError
from swifti2v.stage_two import StageTwo

torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 2


def fail(*_: Any, **__: Any) -> NoReturn:
    """Fail as a card does that is full."""
    msg = "this card is full"
    raise MemoryBudgetError(msg)


if __name__ == "__main__":
    if os.environ.get("FAILING_RANK") == os.environ["RANK"]:
        StageTwo.refine = fail  # type: ignore[method-assign]
    main()
