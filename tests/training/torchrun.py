"""Scripts and commands on several processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_on(count: int, *arguments: str | Path) -> str:
    """Run a script (or ``-m module``) on so many processes; return what they printed, fail with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    given = [*command, *map(str, arguments)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=1800, check=False, env=environment)  # noqa: S603 - our own script
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_on_two(*arguments: str | Path) -> str:
    """Run `swifti2v` on two processes; see `run_on`."""
    return run_on(2, "-m", "swifti2v.cli.main", *arguments)
