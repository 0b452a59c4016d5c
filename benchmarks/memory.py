"""How much memory and time the command needs, and whether memory grows with the length of the clip.

Command: ``python -m benchmarks.memory --model mini --size 2560x1408 --frames 81 321``.
Each row is ``swifti2v generate ... --json`` in a process of its own. Peak: the high-water mark of its resident set,
which the kernel keeps (VmHWM of /proc, so this needs Linux; read 50 times a second), weights and libraries included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import add_result_arguments, markdown_table, number, say, settings_of, write_results

if TYPE_CHECKING:
    from collections.abc import Sequence

GIBIBYTE = 2**30
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class ChildRun:
    """A finished child process: what it printed, and the peak of its resident set."""

    output: str
    peak_bytes: int


@dataclass(frozen=True)
class MemoryRow:
    """One run of the command."""

    size: str
    num_frames: int
    peak_bytes: int
    load_seconds: float
    first_frames_seconds: float
    seconds: float


def run_child(command: Sequence[str]) -> ChildRun:
    """Run a command to its end.

    Raises:
        RuntimeError: it did not end well; the message holds the end of what it wrote to standard error.
    """
    peak_bytes = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)  # noqa: S603 - a command of this benchmark
        # Not the `ru_maxrss` of the reaped process: that counts its parent's peak too, from before the exec.
        while process.poll() is None:
            peak_bytes = max(peak_bytes, high_water_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            msg = f"{' '.join(command)} ended with {process.returncode}: {errors.read().decode()[-2000:]}"
            raise RuntimeError(msg)
        return ChildRun(output.read().decode(), peak_bytes)


def high_water_bytes(pid: int) -> int:
    """Return VmHWM of a process, the peak of its resident set so far; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def generate_command(arguments: argparse.Namespace, num_frames: int, output: Path) -> list[str]:
    """Return the command line of one row."""
    command = [
        sys.executable, "-m", "swifti2v.cli.main", "generate", str(arguments.image), "--model", arguments.model,
        "--prompt", arguments.prompt, "--size", arguments.size, "--frames", str(num_frames),
        "--output", str(output), "--json",
    ]  # fmt: skip
    return command + (["--refiner", arguments.refiner] if arguments.refiner else [])


def measure(arguments: argparse.Namespace, num_frames: int) -> MemoryRow:
    """Run the command once."""
    with tempfile.TemporaryDirectory() as folder:
        child = run_child(generate_command(arguments, num_frames, Path(folder) / "video.mp4"))
    told = json.loads(child.output.strip().splitlines()[-1])
    seconds = {name: told[name] for name in ("load_seconds", "first_frames_seconds", "seconds")}
    return MemoryRow(told["size"], told["num_frames"], child.peak_bytes, **seconds)


def table(rows: Sequence[MemoryRow]) -> str:
    """Return the Markdown table."""
    header = ("size", "frames", "peak GiB", "load s", "first frames s", "all frames s")
    return markdown_table(
        header,
        [
            (
                row.size,
                str(row.num_frames),
                number(row.peak_bytes / GIBIBYTE),
                number(row.load_seconds, 1),
                number(row.first_frames_seconds, 1),
                number(row.seconds, 1),
            )
            for row in rows
        ],
    )


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name or folder of a checkpoint")
    parser.add_argument("--image", type=Path, default=Path("examples/lake-sherburne.jpg"))
    parser.add_argument("--prompt", default="the camera pans right")
    parser.add_argument("--size", default="2560x1408")
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 321], help="each 4k+1")
    parser.add_argument("--refiner", choices=("concat", "training-free", "none"))
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    rows = []
    for num_frames in arguments.frames:
        say(f"{arguments.size}x{num_frames} ...")
        rows.append(measure(arguments, num_frames))
        say(f"  {rows[-1].peak_bytes / GIBIBYTE:.2f} GiB, {rows[-1].seconds:.0f} s")
    print(table(rows))
    content = {"settings": settings_of(arguments), "rows": [asdict(row) for row in rows]}
    say(f"written to {write_results('memory', content, arguments.output)}")


if __name__ == "__main__":
    main()
