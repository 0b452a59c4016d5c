"""Does the picture move as the prompt says, and keep its detail? On real Stage I output, where there is no truth.

Command: ``python -m benchmarks.motion --model mini --image PHOTO --size 1280x704 --frames 81 [--pictures DIR]``.

Motion: for each procedural prompt Stage I alone is run, and the optical flow (DIS) between neighbouring frames of the
motion reference is compared with the motion that the prompt's words stand for (`swifti2v.data.procedural`, default
speed), in pixels per frame of the motion reference. Ratio: of the mean lengths of the vectors. Agreement: cosine
between both fields over all pixels and frames.

Detail: for a few of the prompts the whole video is made with the transported and with the replaced first frame, from
the same motion reference. Retention: `detail_retention` of a frame against the input image (1 best). Warping error
(times 1000), mean flow and seam ratios as in `swifti2v.evaluation`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import pictures
from benchmarks.motion_fields import MotionSummary, agreement, asked_field, made_field, summarise
from benchmarks.results import (
    Check,
    add_result_arguments,
    checks_table,
    judged,
    markdown_table,
    mean,
    number,
    say,
    settings_of,
    write_results,
)
from swifti2v.data.procedural import PHRASES, MotionName, find_horizon
from swifti2v.evaluation.metrics import detail_retention, mean_flow, warping_error
from swifti2v.evaluation.motion import FramePair, consecutive_pairs
from swifti2v.evaluation.seams import frame_change, seam_ratio_of_changes
from swifti2v.geometry import Size
from swifti2v.runner.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from swifti2v.runs import FinishedFrames, GenerationRequest

Array = np.ndarray[Any, Any]

NAMES: tuple[MotionName, ...] = (
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "rotate clockwise",
    "rotate counterclockwise", "truck left", "truck right", "drift left", "ripple", "sway", "still",
)  # fmt: skip
FULL_NAMES: tuple[MotionName, ...] = ("pan right", "zoom in", "sway")
OPPOSITES = (
    ("pan left", "pan right", "x"),
    ("tilt up", "tilt down", "y"),
    ("zoom in", "zoom out", "zoom"),
    ("rotate clockwise", "rotate counterclockwise", "rotation"),
    ("truck left", "truck right", "x"),
)
UNITS = {"x": "px to the right", "y": "px down", "zoom": "% growth", "rotation": "degrees clockwise"}
MODES = ("transport", "replace")
RETENTION_EVERY = 8
THUMBNAIL_WIDTH = 480
# Three of these crops, enlarged, are as wide as four thumbnails.
CROP = Size(214, 120)
CROP_ENLARGEMENT = 3


@dataclass(frozen=True)
class PromptResult:
    """A prompt's motion as asked for and as made."""

    prompt: str
    asked: MotionSummary
    made: MotionSummary
    agreement: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Made over asked, of the mean lengths; NaN for a prompt that asks for no motion."""
        return self.made.magnitude / self.asked.magnitude if self.asked.magnitude > 0 else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        fields = {"prompt": self.prompt, "asked": self.asked._asdict(), "made": self.made._asdict()}
        return fields | {"ratio": self.ratio, "agreement": self.agreement, "seconds": self.seconds}


def prompt_of(name: MotionName) -> str:
    """Return the sentence that stands for a motion."""
    return PHRASES[name][1]


def frames_of(pieces: Iterable[FinishedFrames]) -> Iterator[Array]:
    """Yield single frames, uint8 [H, W, 3]."""
    for piece in pieces:
        yield from piece.frames.numpy()


def measure_prompt(
    pipe: TwoStagePipeline, request: GenerationRequest, name: MotionName, work_dir: Path
) -> PromptResult:
    """Run Stage I into `work_dir` and compare its motion with the prompt's."""
    begun = time.perf_counter()
    frames = list(frames_of(pipe.preview(request, work_dir=work_dir)))
    seconds = time.perf_counter() - begun
    size = Size(frames[0].shape[1], frames[0].shape[0])
    asked = asked_field(name, size=size, num_frames=len(frames), horizon=find_horizon(frames[0]))
    made = made_field(frames)
    return PromptResult(request.prompt, summarise(asked), summarise(made), agreement(made, asked), seconds)


def measure_video(
    frames: Iterable[Array], image: Array, *, segment_size: int, keep: Iterable[int]
) -> tuple[dict[str, Any], dict[int, Array]]:
    """Measure a video against its input image, both uint8 [H, W, 3] a frame; return also the frames of indices `keep`.

    Holds two frames and what is kept.
    """
    wanted = set(keep)
    kept: dict[int, Array] = {}

    def watched() -> Iterator[Array]:
        for index, frame in enumerate(frames):
            if index in wanted:
                kept[index] = frame.copy()
            yield frame

    changes, errors, lengths = [], [], []
    retention: dict[int, float] = {}
    for index, pair in enumerate(consecutive_pairs(watched()), start=1):
        changes.append(frame_change(pair))
        errors.append(warping_error(pair))
        lengths.append(mean_flow(pair).magnitude)
        if index % RETENTION_EVERY == 0:
            retention[index] = detail_retention(FramePair(image, pair.later)).retention
    seams = seam_ratio_of_changes(changes, segment_size=segment_size)
    measures = {
        "retention": retention,
        "mean_retention": mean(retention.values()),
        "warping_error": mean(errors),
        "mean_flow": mean(lengths),
        "seam_luma": seams.luma,
        "seam_detail": seams.detail,
        "seam_worst": seams.worst,
    }
    return measures, kept


def full_videos(
    pipe: TwoStagePipeline, request: GenerationRequest, motion_dir: Path, picture: Path | None
) -> dict[str, Any]:
    """Make and measure the video by each rule, from the motion reference in `motion_dir`."""
    image = np.asarray(request.image)
    last = request.settings.num_frames - 1
    shown = sorted({last // 3, 2 * last // 3, last})
    measures, kept = {}, {}
    for mode in MODES:
        begun = time.perf_counter()
        chosen = replace(request, settings=replace(request.settings, reference=mode))
        with tempfile.TemporaryDirectory() as scratch:
            # A copy: a work directory belongs to one run of Stage II.
            work_dir = Path(shutil.copytree(motion_dir, Path(scratch) / mode))
            frames = frames_of(pipe.stream(chosen, work_dir=work_dir))
            measures[mode], kept[mode] = measure_video(
                frames, image, segment_size=request.settings.segment_size, keep=shown
            )
        say(f"  {request.prompt}, {mode}: {time.perf_counter() - begun:.0f} s with measuring")
    if picture is not None:
        pictures.save(contact_sheet(request.prompt, image, kept), picture)
    return measures


def contact_sheet(prompt: str, image: Array, kept: dict[str, dict[int, Array]]) -> Array:
    """Return the input and three frames of the video, and below, enlarged, what either rule made of a place."""
    ours, paper = kept["transport"], kept["replace"]
    last = max(ours)
    place = pictures.most_different_place(ours[last], paper[last], CROP)
    source = pictures.followed(place, image, ours[last])
    above = [pictures.Panel(f"input, “{prompt}”", pictures.fitted(pictures.marked(image, source), THUMBNAIL_WIDTH))]
    for index, frame in sorted(ours.items()):
        shown = pictures.marked(frame, place) if index == last else frame
        above.append(pictures.Panel(f"frame {index}", pictures.fitted(shown, THUMBNAIL_WIDTH)))
    below = [
        ("input", image, source),
        (f"frame {last}, replace", paper[last], place),
        (f"frame {last}, transport", ours[last], place),
    ]
    crops = [pictures.Panel(label, pictures.enlarged(at.of(frame), CROP_ENLARGEMENT)) for label, frame, at in below]
    return pictures.sheet([pictures.row(above), pictures.row(crops)])


def run(arguments: argparse.Namespace) -> tuple[dict[str, PromptResult], dict[str, Any]]:
    """Measure every prompt; return motions by name, and videos by name and rule."""
    pipe = TwoStagePipeline.from_pretrained(arguments.model)
    options = {"size": Size.parse(arguments.size), "num_frames": arguments.frames, "seed": arguments.seed}
    motions: dict[str, PromptResult] = {}
    videos: dict[str, Any] = {}
    names = list(dict.fromkeys([*arguments.prompts, *arguments.full_prompts]))
    for position, name in enumerate(names, start=1):
        request = pipe.request(arguments.image, prompt_of(name), **options)
        with tempfile.TemporaryDirectory() as scratch:
            motion_dir = Path(scratch) / "motion"
            motions[name] = measure_prompt(pipe, request, name, motion_dir)
            say(f"{position}/{len(names)} {name}: {motions[name].seconds:.0f} s")
            if name in arguments.full_prompts:
                file = f"motion_{name.replace(' ', '_')}.jpg"
                picture = arguments.pictures / file if arguments.pictures else None
                videos[name] = full_videos(pipe, request, motion_dir, picture)
    return motions, videos


def motion_table(motions: dict[str, PromptResult]) -> str:
    """Return the Markdown table of the prompts."""
    header = ("prompt", "asked px/frame", "made px/frame", "ratio", "agreement", "x", "y", "zoom %", "rotation deg")
    rows = []
    for result in motions.values():
        asked, made = result.asked, result.made
        pairs = (("x", 2), ("y", 2), ("zoom", 2), ("rotation", 3))
        cells = [f"{number(getattr(made, n), d)} ({number(getattr(asked, n), d)})" for n, d in pairs]
        amounts = [number(asked.magnitude), number(made.magnitude), number(result.ratio), number(result.agreement)]
        rows.append((result.prompt, *amounts, *cells))
    return markdown_table(header, rows) + "\n\nPer frame of the motion reference; in brackets what the prompt asks for."


def opposites_table(motions: dict[str, PromptResult]) -> str:
    """Return the Markdown table of the opposite prompts."""
    rows = [
        (
            f"{one} / {other}",
            UNITS[quantity],
            number(getattr(motions[one].made, quantity), 3),
            number(getattr(motions[other].made, quantity), 3),
            "yes" if are_opposite(motions[one], motions[other], quantity) else "**no**",
        )
        for one, other, quantity in _present_opposites(motions)
    ]
    return markdown_table(("opposite prompts", "per frame", "first", "second", "opposite, and as asked"), rows)


def are_opposite(one: PromptResult, other: PromptResult, quantity: str) -> bool:
    """Return whether both move as they were asked to in a quantity (and so against each other)."""
    return all(getattr(r.made, quantity) * getattr(r.asked, quantity) > 0 for r in (one, other))


def videos_table(videos: dict[str, Any]) -> str:
    """Return the Markdown table of the full videos."""
    indices = next(iter(next(iter(videos.values())).values()))["retention"]
    header = (
        "prompt, reference", *(f"retention at {index}" for index in indices),
        "mean", "warping error x1000", "flow px/frame", "seams luma", "detail",
    )  # fmt: skip
    rows = []
    for name, modes in videos.items():
        for mode, measures in modes.items():
            over_time = [number(value) for value in measures["retention"].values()]
            others = [number(measures["mean_retention"]), number(1e3 * measures["warping_error"], 3)]
            seams = [number(measures[key], 3) for key in ("seam_luma", "seam_detail")]
            rows.append((f"{name}, {mode}", *over_time, *others, number(measures["mean_flow"]), *seams))
    return markdown_table(header, rows)


def checks(motions: dict[str, PromptResult], videos: dict[str, Any]) -> list[Check]:
    """Compare with what is required."""
    ratios = {name: result.ratio for name, result in motions.items() if result.asked.magnitude > 0}
    judgements = []
    if ratios:
        lowest, highest = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        measured = f"{ratios[lowest]:.2f} ({lowest}) .. {ratios[highest]:.2f} ({highest})"
        holds = all(0.5 <= ratio <= 2 for ratio in ratios.values())
        judgements.append(Check("motion / asked motion 0.5 .. 2, every prompt", measured, holds))
    pairs = list(_present_opposites(motions))
    if pairs:
        good = sum(are_opposite(motions[one], motions[other], quantity) for one, other, quantity in pairs)
        judgements.append(Check("opposite prompts move opposite ways", f"{good} of {len(pairs)}", good == len(pairs)))
    seams = [measures["seam_worst"] for modes in videos.values() for measures in modes.values()]
    if seams:
        judgements.append(
            Check("seam ratio <= 1.05, worst video", number(max(seams), 3), judged(max(seams), at_most=1.05))
        )
    return judgements


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name or folder of a checkpoint")
    parser.add_argument("--image", type=Path, default=Path("examples/lake-sherburne.jpg"))
    parser.add_argument("--size", default="1280x704", help="of the output; the motion reference follows from it")
    parser.add_argument("--frames", type=int, default=81, help="4k+1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", nargs="*", default=list(NAMES), choices=list(PHRASES), help="motions for Stage I")
    parser.add_argument("--full-prompts", nargs="*", default=list(FULL_NAMES), choices=list(PHRASES))
    add_result_arguments(parser)
    arguments = parser.parse_args()
    with torch.no_grad():
        motions, videos = run(arguments)
    judgements = checks(motions, videos)
    tables = [motion_table(motions), opposites_table(motions)]
    if videos:
        tables.append(videos_table(videos))
    print(*tables, checks_table(judgements), sep="\n\n")
    content = {
        "settings": settings_of(arguments),
        "motions": {name: result.as_json() for name, result in motions.items()},
        "videos": videos,
        "checks": [vars(check) for check in judgements],
    }
    say(f"written to {write_results('motion', content, arguments.output)}")


def _present_opposites(motions: dict[str, PromptResult]) -> Iterator[tuple[str, str, str]]:
    return (entry for entry in OPPOSITES if entry[0] in motions and entry[1] in motions)


if __name__ == "__main__":
    main()
