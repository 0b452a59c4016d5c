"""The commands on two processes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def run_on_two(*arguments: str | Path) -> str:
    """Run `swifti2v` under torchrun and return what both processes printed; fail with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [str(argument) for argument in arguments]
    done = subprocess.run(  # noqa: S603 - our own command
        [*command, "-m", "swifti2v.cli.main", *given], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
