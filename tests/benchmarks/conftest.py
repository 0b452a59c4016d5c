"""The benchmarks are not installed: they are run, and imported here, from the root of the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
