"""Scores of a folder of videos by a checkout of VBench, which runs in a Python environment of its own.

VBench is never imported here: its dependencies exclude ours, and several of its parts are for non-commercial use only
(AMT of motion_smoothness and CoTracker of camera_motion: CC BY-NC 4.0; pyiqa of imaging_quality: non-commercial). The
user names the checkout and the interpreter, and a process is started for each dimension, so that a scoring that was
interrupted continues with the dimension it was at.

The class of VBench is called, not its script: the script drops ``--load_ckpt_from_local``. It is given a
``torch.device``, as by the script: with the string "cuda" motion_smoothness would be scored at a size that depends on
the memory of the card. Pictures are found relative to the folder that the process starts in, the suite's.

Seven of the nine dimensions see the video at 512 pixels or fewer; only motion_smoothness and dynamic_degree see 2K.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError, MemoryBudgetError, VideoInputError
from swifti2v.evaluation.interpreter import find_interpreter, last_line
from swifti2v.evaluation.vbench.clips import NUM_SAMPLES, video_name
from swifti2v.evaluation.vbench.suite import PROMPTS_PATH, checkout_commit
from swifti2v.evaluation.vbench.total import DIMENSION_NAMES, RESULT_SUFFIX, check_dimensions, read_results, read_scores
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from swifti2v.evaluation.vbench.suite import Suite
    from swifti2v.geometry import Size

SCORING_NAME, VERSIONS_NAME = "scoring.json", "versions.json"

_NEEDED_FILES = (
    "vbench/__init__.py",
    "vbench2_beta_i2v/__init__.py",
    "vbench2_beta_i2v/third_party/cotracker",
    PROMPTS_PATH,
)
# What VBench's interpreter says, and what to do about it; the first that fits is told.
_REMEDIES = (
    ("pkg_resources", "install 'setuptools<81' there"),
    ("cannot import name 'Cache'", "install transformers and peft of the same year there"),
    ("torchvision::nms", "install torch and torchvision of one build there"),
    ("cotracker", "use a git checkout of VBench: the PyPI package lacks CoTracker"),
    ("weights_only", "use VBench at 45e79ec or later"),
    ("No module named", "install the package there"),
    ("out of memory", "use a card with more memory: dynamic_degree takes about 30 GB at 2560x1408"),
    ("URLError", "let that process reach the network, or fetch the weights first"),
    ("ConnectionError", "let that process reach the network, or fetch the weights first"),
)

_EVALUATE = """
import importlib.metadata, json, sys
job = json.loads(sys.argv[1])
sys.path.insert(0, job["checkout"])
import torch
import vbench
from vbench2_beta_i2v import VBenchI2V
if not vbench.__file__.startswith(job["checkout"]):
    raise ImportError("vbench is imported from " + vbench.__file__ + ", not from the checkout; uninstall it there")
with open(job["versions"], "w") as file:
    found = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    json.dump({"python": sys.version.split()[0], **found}, file)
VBenchI2V(torch.device(job["device"]), job["prompts"], job["output"]).evaluate(
    videos_path=job["videos"],
    name=job["dimension"],
    dimension_list=[job["dimension"]],
    resolution=job["ratio"],
    local=job["local_weights"],
    imaging_quality_preprocessing_mode="longer",
)
"""


@dataclass(frozen=True)
class Judge:
    """VBench as the user has it.

    Args:
        checkout: of Vchitect/VBench.
        python: the interpreter of its environment: a path, or a name on the search path.
        device: that the networks run on; i2v_background needs a CUDA card.
        local_weights: look for weights in VBench's cache before GitHub is asked.
    """

    checkout: Path
    python: str
    device: str = "cuda"
    local_weights: bool = False


@dataclass(frozen=True)
class Scoring:
    """What a scoring found, and by what.

    Args:
        scores: of the dimensions, fractions.
        num_videos: judged, by dimension.
        seconds: that each dimension took; only of those scored in this call.
        versions: of Python and the packages of VBench's environment; antialiasing in torchvision changes scores.
        commit: of VBench's checkout, if it is under git.
        videos: the folder that was judged.
        size: of the videos.
        notes: what has to be known when the numbers are read.
    """

    scores: Mapping[str, float]
    num_videos: Mapping[str, int]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    commit: str | None
    videos: str
    size: str
    notes: tuple[str, ...] = ()


def check_checkout(checkout: Path) -> None:
    """Raise `InvalidInputError` unless the folder is a git checkout of VBench with all its parts."""
    for part in _NEEDED_FILES:
        if not (checkout / part).exists():
            msg = f"{str(checkout)!r} lacks {part}; give a git checkout of Vchitect/VBench, not the PyPI package"
            raise InvalidInputError(msg)


def expected_videos(
    videos: Path, suite: Suite, dimensions: Iterable[str], *, num_samples: int, allow_missing: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the names of the videos that each dimension judges, after checking the folder.

    Raises:
        VideoInputError: something else lies in the folder, videos are missing (unless `allow_missing`), there are more
            samples than `num_samples`, or none for a dimension.
    """
    if not videos.is_dir():
        msg = f"folder {str(videos)!r} does not exist; give the folder of videos that `vbench generate` made"
        raise VideoInputError(msg)
    found = {path.name for path in videos.iterdir()}
    known = {video_name(entry.prompt, index) for entry in suite.prompts for index in range(NUM_SAMPLES)}
    asked = {video_name(entry.prompt, index) for entry in suite.prompts for index in range(num_samples)}
    if strange := sorted(found - known):
        msg = f"folder {str(videos)!r} holds {strange[0]!r}, which is no video of the suite; move it away"
        raise VideoInputError(msg)
    if more := sorted(found - asked):
        msg = f"folder {str(videos)!r} holds {more[0]!r}, beyond {num_samples} samples; pass a larger --samples"
        raise VideoInputError(msg)
    expected = {}
    for name in check_dimensions(dimensions):
        prompts = [entry.prompt for entry in suite.prompts if name in entry.dimensions]
        wanted = [video_name(prompt, index) for prompt in prompts for index in range(num_samples)]
        present = tuple(video for video in wanted if video in found)
        if not present or (len(present) < len(wanted) and not allow_missing):
            absent = next((video for video in wanted if video not in found), "any video")
            msg = (
                f"{name} lacks {len(wanted) - len(present)} of {len(wanted)} videos, {absent!r} for one; "
                "finish `vbench generate`, or pass --samples or --allow-missing"
            )
            raise VideoInputError(msg)
        expected[name] = present
    return expected


def check_sizes(videos: Path, names: Iterable[str], suite: Suite) -> Size:
    """Return the size of the videos; raise `VideoInputError` unless all have one, of the aspect of the suite.

    i2v_background squeezes picture and frames to a square: with unequal aspects it would compare unequal shapes.
    """
    from swifti2v.media.video_reader import VideoReader

    size: Size | None = None
    for name in names:
        found = VideoReader(videos / name).info.size
        size = size or found
        if found != size:
            msg = f"{str(videos / name)!r} is {found}, others are {size}; make all videos in one size"
            raise VideoInputError(msg)
    if size is None:
        msg = f"folder {str(videos)!r} holds no videos; run `swifti2v vbench generate` first"
        raise VideoInputError(msg)
    if abs(size.width * suite.size.height / (size.height * suite.size.width) - 1) > 0.01:
        msg = f"the videos are {size}, the suite's pictures {suite.size}; prepare a suite of the aspect of the videos"
        raise VideoInputError(msg)
    return size


def score_videos(
    videos: Path,
    suite: Suite,
    judge: Judge,
    output: Path,
    *,
    dimensions: Iterable[str] = DIMENSION_NAMES,
    num_samples: int = NUM_SAMPLES,
    allow_missing: bool = False,
    on_dimension: Callable[[str, int], None] | None = None,
) -> Scoring:
    """Score the videos in each dimension that has no result yet, and write ``scoring.json``.

    Args:
        videos: folder of ``<prompt>-<index>.mp4`` and nothing else.
        suite: of the pictures that the videos were made from.
        judge: VBench.
        output: folder of the results: ``vbench/`` holds VBench's own files, ``logs/`` what it printed.
        dimensions: of the nine.
        num_samples: videos for each prompt.
        allow_missing: score what there is; the scores are then not comparable.
        on_dimension: called before a dimension is scored, with the number of its videos.

    Raises:
        InvalidInputError: VBench cannot be run, or failed; the message names the log.
        VideoInputError: the videos are incomplete, or of another shape.
        MemoryBudgetError: the card's memory is too small.
        OutputError: the folder cannot be written.
    """
    names = check_dimensions(dimensions)
    expected = expected_videos(videos, suite, names, num_samples=num_samples, allow_missing=allow_missing)
    size = check_sizes(videos, sorted({video for present in expected.values() for video in present}), suite)
    check_checkout(judge.checkout)
    python = find_interpreter(judge.python, owner="VBench")
    results = output / "vbench"
    make_folder(results)
    make_folder(output / "logs")
    _link_weights(judge, suite)
    seconds: dict[str, float] = {}
    for name in names:
        if not (results / f"{name}{RESULT_SUFFIX}").is_file():
            if on_dimension is not None:
                on_dimension(name, len(expected[name]))
            started = time.perf_counter()
            _evaluate(name, videos, suite, replace(judge, python=python), output)
            seconds[name] = round(time.perf_counter() - started, 1)
        _check_result(results / f"{name}{RESULT_SUFFIX}", name, [videos.resolve() / video for video in expected[name]])
    every_score = read_scores(results)
    scoring = Scoring(
        scores={name: every_score[name] for name in names},
        num_videos={name: len(expected[name]) for name in names},
        seconds=seconds,
        versions=read_results(output / VERSIONS_NAME) if (output / VERSIONS_NAME).is_file() else {},
        commit=checkout_commit(judge.checkout),
        videos=str(videos),
        size=str(size),
        notes=_notes(names, size, num_samples, allow_missing=allow_missing),
    )
    write_atomically(output / SCORING_NAME, (json.dumps(asdict(scoring), indent=1) + "\n").encode())
    return scoring


def _link_weights(judge: Judge, suite: Suite) -> None:
    """DreamSim keeps its weights in ``models`` of the folder it is started in: use those of the checkout, if any."""
    weights, link = judge.checkout.resolve() / "models", suite.folder / "models"
    if weights.is_dir() and not link.exists():
        link.symlink_to(weights, target_is_directory=True)


def _evaluate(name: str, videos: Path, suite: Suite, judge: Judge, output: Path) -> None:
    job = {
        "checkout": str(judge.checkout.resolve()),
        "prompts": str(judge.checkout.resolve() / PROMPTS_PATH),
        "videos": str(videos.resolve()),
        "output": str((output / "vbench").resolve()),
        "versions": str((output / VERSIONS_NAME).resolve()),
        "dimension": name,
        "ratio": suite.ratio,
        "device": judge.device,
        "local_weights": judge.local_weights,
    }
    log = output / "logs" / f"{name}.log"
    with log.open("wb") as file:
        command = [judge.python, "-c", _EVALUATE, json.dumps(job)]
        done = subprocess.run(command, cwd=suite.folder, stdout=file, stderr=subprocess.STDOUT, check=False)  # noqa: S603 - the interpreter that the user named
    if done.returncode == 0:
        return
    said = log.read_text(encoding="utf-8", errors="replace")[-20_000:]
    msg = f"VBench failed on {name} ({last_line(said)}); {_remedy(said)}; its words are in {str(log)!r}"
    raise (MemoryBudgetError if "out of memory" in said else InvalidInputError)(msg)


def _check_result(path: Path, name: str, expected: Iterable[Path]) -> None:
    """VBench passes over missing videos with a warning, so what it judged is compared with what it should have."""
    result = read_results(path).get(name)
    entries = result[-1] if isinstance(result, list) and isinstance(result[-1], list) else []
    judged = sorted(str(entry.get("video_path")) for entry in entries)
    wanted = sorted(map(str, expected))
    if judged != wanted:
        amount = f"{len(judged)} videos, not the {len(wanted)}" if len(judged) != len(wanted) else "others than those"
        msg = f"{str(path)!r} judges {amount} of the folder; remove it and score again"
        raise VideoInputError(msg)


def _notes(names: tuple[str, ...], size: Size, num_samples: int, *, allow_missing: bool) -> tuple[str, ...]:
    notes = []
    if num_samples < NUM_SAMPLES or allow_missing:
        notes.append(f"not the {NUM_SAMPLES} videos of every prompt: not comparable with the leaderboard")
    if "dynamic_degree" not in names:
        notes.append("without dynamic_degree a still picture would score near 1: score it too")
    cells = (size.width // 8) * (size.height // 8)
    if "dynamic_degree" in names and cells**2 > 2**31:
        notes.append(
            f"dynamic_degree: RAFT correlates {cells**2 / 1e9:.1f}e9 pairs at {size}, above 2^31, where some "
            "versions of torch overflow; compare with the videos reduced"
        )
    if min(size) > 512:
        notes.append("all but motion_smoothness and dynamic_degree see the videos at 512 pixels or fewer")
    return tuple(notes)


def _remedy(said: str) -> str:
    return next((remedy for sign, remedy in _REMEDIES if sign in said), "read the README of VBench")
