"""Whether this tree makes the same videos as an older commit: `mini`, the same seed, every way to run it.

Command: ``python -m benchmarks.same_numbers d53e669``.

Each way runs in both trees through the command line: `generate`; `preview`, then `generate --work-dir`; a `generate`
that is killed after its first segment and resumed; a job and a preview job with a worker. Decoded frames, motion
references and the latents of the segments are compared. `benchmarks/same_losses.py` does the same for training and is
called at the end, where it exists. One line for each thing compared; the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import safetensors.torch

from benchmarks.results import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Array = np.ndarray[Any, Any]
Results = dict[str, Array]  # what was made, by its name

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "examples" / "lake-sherburne.jpg"
ASKED = ("--model", "mini", "--prompt", "pan right slowly", "--size", "320x192", "--frames", "33", "--seed", "7")
KILL_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Tree:
    """A checkout of the project, and the folder that its runs write to."""

    root: Path
    folder: Path

    def start(self, *words: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
        """Start ``swifti2v words ...`` of this tree in its folder, on one thread unless the environment says more."""
        scripts = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
        module, function = scripts["swifti2v"].split(":")
        code = f"import sys; from {module} import {function}; sys.argv[0] = 'swifti2v'; {function}()"
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(self.root / "src")}
        return subprocess.Popen(  # noqa: S603 - this project's own command
            [sys.executable, "-c", code, *map(str, words)], cwd=self.folder, env=environment, text=True, **kwargs
        )

    def run(self, *words: str | Path) -> str:
        """Run ``swifti2v words ...`` to its end and return what it printed.

        Raises:
            RuntimeError: the command failed; the message holds its error output.
        """
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        printed, errors = process.communicate()
        if process.returncode != 0:
            msg = f"`swifti2v {' '.join(map(str, words))}` failed in {self.root}:\n{errors}"
            raise RuntimeError(msg)
        return printed


def generated(tree: Tree) -> Results:
    """`generate` in one go."""
    tree.run("generate", IMAGE, *ASKED, "--output", "plain.mp4")
    return {"frames": video_frames(tree.folder / "plain.mp4")}


def previewed(tree: Tree) -> Results:
    """`preview`, then `generate` from its work directory."""
    work = tree.folder / "previewed"
    tree.run("preview", IMAGE, *ASKED, "--output", "motion.mp4", "--work-dir", work)
    tree.run("generate", IMAGE, *ASKED, "--output", "previewed.mp4", "--work-dir", work)
    preview = {"frames of the preview": video_frames(tree.folder / "motion.mp4")}
    return preview | {"frames": video_frames(tree.folder / "previewed.mp4")} | kept_in(work)


def resumed(tree: Tree) -> Results:
    """`generate`, killed with SIGKILL as soon as a segment is finished, then run again."""
    work = tree.folder / "killed"
    words = ("generate", IMAGE, *ASKED, "--output", "resumed.mp4", "--work-dir", work)
    process = tree.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = time.monotonic() + KILL_TIMEOUT_SECONDS
    while not (first := segment_files(work)) and process.poll() is None and time.monotonic() < last:
        time.sleep(0.002)
    process.kill()
    process.wait()
    at_kill = len(segment_files(work))
    tree.run(*words)
    finished = len(segment_files(work))
    if not first or at_kill == finished:
        msg = f"the run in {tree.root} was not killed in time: {at_kill} of {finished} segments were finished"
        raise RuntimeError(msg)
    say(f"    killed after {at_kill} of {finished} segments")
    return {"frames": video_frames(tree.folder / "resumed.mp4")} | kept_in(work)


def queued(tree: Tree) -> Results:
    """A job and a preview job, done by one worker."""
    data = ("--data", "data")
    job = tree.run("jobs", "submit", IMAGE, *ASKED, *data).strip()
    preview = tree.run("jobs", "submit", IMAGE, *ASKED, *data, "--preview").strip()
    tree.run("jobs", "work", "--model", "mini", "--until-idle", *data)
    found = {}
    for name, submitted in (("job", job), ("preview job", preview)):
        described = json.loads(tree.run("jobs", "show", submitted, *data))
        if described["video"] is None:
            msg = f"the {name} in {tree.root} came to nothing: {described}"
            raise RuntimeError(msg)
        found[f"frames of the {name}"] = video_frames(tree.folder / described["video"])
    return found | kept_in(tree.folder / "data")


WAYS: dict[str, Callable[[Tree], Results]] = {
    "generate": generated,
    "preview, then generate": previewed,
    "killed and resumed": resumed,
    "job": queued,
}


def video_frames(path: Path) -> Array:
    """Return the frames of a file as PyAV decodes them: uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def segment_files(work: Path) -> list[Path]:
    """Return the files of finished segments below a folder, in order."""
    return sorted(work.rglob("segment_*.safetensors"))


def kept_in(work: Path) -> Results:
    """Return the motion reference and the latents of segments that lie below a folder."""
    found = {}
    if pieces := sorted(work.rglob("motion_reference/piece_*.npy")):
        found["motion reference"] = np.concatenate([np.load(piece) for piece in pieces])
    if segments := segment_files(work):
        tensors = [safetensors.torch.load_file(path)["targets"] for path in segments]
        found |= {f"segment {index}": tensor.double().numpy() for index, tensor in enumerate(tensors)}
    return found


def difference(old: Array | None, new: Array | None) -> str | None:
    """Say how two arrays differ; None where they hold the same numbers."""
    if old is None or new is None:
        return "only in this tree" if old is None else "only in the older commit"
    if old.shape != new.shape:
        return f"shape {list(old.shape)} became {list(new.shape)}"
    if np.array_equal(old, new):
        return None
    gaps = np.abs(old.astype(np.float64) - new.astype(np.float64))
    return f"max difference {gaps.max():.4g}, mean {gaps.mean():.4g}"


def compare(old: Results, new: Results) -> dict[str, str | None]:
    """Return how each thing differs, None where it is the same; in the order in which it was made."""
    return {name: difference(old.get(name), new.get(name)) for name in old | new}


def git(*words: str) -> None:
    """Run a git command in this repository."""
    subprocess.run(["git", *words], cwd=ROOT, check=True)  # noqa: S603, S607 - git of the path, as everywhere


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Give a temporary git worktree of a commit."""
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        root = Path(folder) / "old"
        git("worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def compare_ways(old_root: Path, names: Sequence[str]) -> int:
    """Run the named ways in both trees, print a line for each thing compared, and return how many differ."""
    count = 0
    for name in names:
        made = []
        for label, root in (("old", old_root), ("new", ROOT)):
            say(f"{name}: {label}")
            with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
                made.append(WAYS[name](Tree(root, Path(folder))))
        for what, differs in compare(*made).items():
            print(
                f"{'different' if differs else 'same':<10}{name}: {what}{f' ({differs})' if differs else ''}",
                flush=True,
            )
            count += differs is not None
    return count


def main() -> None:
    """Read the command line, run, print, and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older commit, as git names it")
    parser.add_argument("--only", action="append", choices=[*WAYS, "training"], help="one way; may be repeated")
    arguments = parser.parse_args()
    wanted = arguments.only or [*WAYS, "training"]
    with checked_out(arguments.commit) as old_root:
        differing = compare_ways(old_root, [name for name in WAYS if name in wanted])
    if "training" in wanted:
        if (Path(__file__).parent / "same_losses.py").exists():
            command = [sys.executable, "-m", "benchmarks.same_losses", arguments.commit]
            differing += subprocess.run(command, cwd=ROOT, check=False).returncode != 0  # noqa: S603 - our own
        else:
            print("skipped   training: benchmarks/same_losses.py does not exist")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
