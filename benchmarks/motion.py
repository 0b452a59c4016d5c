"""Does the picture move as the prompt says, evenly, and keep its detail? On real Stage I output, without a truth.

Command: ``python -m benchmarks.motion --model mini --image PHOTO --size 1280x704 --frames 81 [--pictures DIR]``.

Motion: for each procedural prompt Stage I alone is run, and the optical flow (DIS) between neighboring frames of the
motion reference is compared with the motion that the prompt's words stand for (`swifti2v.data.procedural`, default
speed). A field is the motion of the content between neighboring frames, [F-1, H, W, 2] float32 in pixels, x to the
right and y down, given at the later frame's pixels. Ratio: of the mean lengths of the vectors. Agreement: cosine
between both fields over all pixels and frames. Judder, first step and steps backward as `swifti2v evaluate` has them.

Detail: for a few of the prompts the whole video is made with the transported and with the replaced first frame, from
the same motion reference, and judged as `swifti2v evaluate` does, against the input image.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from benchmarks import pictures
from benchmarks.results import add_result_arguments, markdown_table, number, say, settings_of, write_results
from swifti2v.data.procedural import PHRASES, Motion, MotionName, displacement, find_horizon
from swifti2v.evaluation.motion import consecutive_pairs
from swifti2v.evaluation.sources import FrameSource
from swifti2v.evaluation.video import Standard, judge_video
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
EVENNESS = ("judder", "first_step", "backward_steps", "motion_pulse")
THUMBNAIL_WIDTH = 480
# Three of these crops, enlarged, are as wide as four thumbnails.
CROP = Size(214, 120)
CROP_ENLARGEMENT = 3


class MotionSummary(NamedTuple):
    """What a field does on average over the picture and the clip.

    Args:
        magnitude: mean length of the vectors, in pixels per frame.
        x, y: mean motion of the content to the right and down, in pixels per frame.
        zoom: growth of the content, in percent per frame (half the divergence of the affine fit).
        rotation: clockwise, in degrees per frame (half the curl of the affine fit).
    """

    magnitude: float
    x: float
    y: float
    zoom: float
    rotation: float


@dataclass(frozen=True)
class PromptResult:
    """A prompt's motion as asked for and as made."""

    prompt: str
    asked: MotionSummary
    made: MotionSummary
    agreement: float
    evenness: dict[str, float]
    seconds: float

    @property
    def ratio(self) -> float:
        """Made over asked, of the mean lengths; NaN for a prompt that asks for no motion."""
        return self.made.magnitude / self.asked.magnitude if self.asked.magnitude > 0 else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        fields = {"prompt": self.prompt, "asked": self.asked._asdict(), "made": self.made._asdict()}
        numbers = {"ratio": self.ratio, "agreement": self.agreement, "seconds": self.seconds}
        return fields | numbers | {"evenness": self.evenness}


def asked_field(name: MotionName, *, size: Size, num_frames: int, horizon: float) -> Array:
    """Return the field of a procedural motion at its default speed.

    `displacement` tells where a pixel was in frame 0, so that its change from one frame to the next is, but for terms
    of second order, the content's motion with the sign turned.
    """
    places = displacement([Motion(name)], size=size, num_frames=num_frames, horizon=horizon)
    return np.asarray(-np.diff(places, axis=0) * np.float32(size.width))


def made_field(frames: Iterable[Array]) -> Array:
    """Return the field of a video's own optical flow; frames as in `swifti2v.evaluation.motion`."""
    return np.stack([-pair.backward for pair in consecutive_pairs(frames)])


def summarize(field: Array) -> MotionSummary:
    """Return the means of a field; zoom and rotation by least squares over all pixels."""
    flow = field.mean(axis=0, dtype=np.float64)
    height, width = flow.shape[:2]
    columns = np.arange(width) - (width - 1) / 2
    rows = (np.arange(height) - (height - 1) / 2)[:, None]
    # The pixels' grid is centered, so that the slopes of a least-squares plane do not depend on each other.
    slope_x = (flow * columns[:, None]).sum(axis=(0, 1)) / (height * (columns**2).sum())
    slope_y = (flow * rows[..., None]).sum(axis=(0, 1)) / (width * (rows**2).sum())
    return MotionSummary(
        magnitude=float(np.linalg.norm(field, axis=-1).mean(dtype=np.float64)),
        x=float(flow[..., 0].mean()),
        y=float(flow[..., 1].mean()),
        zoom=float(100 * (slope_x[0] + slope_y[1]) / 2),
        rotation=float(math.degrees((slope_x[1] - slope_y[0]) / 2)),
    )


def agreement(made: Array, asked: Array) -> float:
    """Return the cosine between two fields of one shape, over all frames and pixels: -1 .. 1; NaN if one is still.

    1 means the same directions in the same places at the same times, whatever the speed.
    """
    product = float((made * asked).sum(dtype=np.float64))
    norms = math.sqrt(float((made**2).sum(dtype=np.float64)) * float((asked**2).sum(dtype=np.float64)))
    return product / norms if norms > 0 else math.nan


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
    values = judged(frames, size, fps=request.settings.fps, standard=Standard())
    return PromptResult(
        request.prompt,
        summarize(asked),
        summarize(made),
        agreement(made, asked),
        {name: values[name] for name in EVENNESS},
        seconds,
    )


def judged(frames: Iterable[Array], size: Size, *, fps: float, standard: Standard) -> dict[str, Any]:
    """Return the values of `swifti2v.evaluation` of frames, uint8 [H, W, 3], which are read once."""
    result = judge_video(FrameSource("video", size, fps, lambda: (frame for frame in frames)), standard)
    curves = {curve.metric: dict(zip(curve.frames, curve.values, strict=True)) for curve in result.curves}
    return {**result.values, "retention": curves.get("detail_retention", {})}


def measure_video(
    frames: Iterable[Array], image: Array, *, fps: float, segment_size: int, keep: Iterable[int]
) -> tuple[dict[str, Any], dict[int, Array]]:
    """Judge a video against its input image, both uint8 [H, W, 3] a frame; return also the frames of indices `keep`."""
    wanted = set(keep)
    kept: dict[int, Array] = {}

    def watched() -> Iterator[Array]:
        for index, frame in enumerate(frames):
            if index in wanted:
                kept[index] = frame.copy()
            yield frame

    size = Size(image.shape[1], image.shape[0])
    return judged(watched(), size, fps=fps, standard=Standard(image=image, segment_size=segment_size)), kept


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
            settings = request.settings
            measures[mode], kept[mode] = measure_video(
                frames, image, fps=settings.fps, segment_size=settings.segment_size, keep=shown
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
    header = (
        "prompt", "asked px/frame", "made px/frame", "ratio", "agreement", "x", "y", "zoom %", "rotation deg",
        *(name.replace("_", " ") for name in EVENNESS),
    )  # fmt: skip
    rows = []
    for result in motions.values():
        asked, made = result.asked, result.made
        pairs = (("x", 2), ("y", 2), ("zoom", 2), ("rotation", 3))
        cells = [f"{number(getattr(made, n), d)} ({number(getattr(asked, n), d)})" for n, d in pairs]
        amounts = [number(asked.magnitude), number(made.magnitude), number(result.ratio), number(result.agreement)]
        rows.append((result.prompt, *amounts, *cells, *(number(result.evenness[name]) for name in EVENNESS)))
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
        "mean", "warping error x1000", "flow px/frame", "seams luma", "detail", "judder",
    )  # fmt: skip
    rows = []
    for name, modes in videos.items():
        for mode, measures in modes.items():
            over_time = [number(value) for value in measures["retention"].values()]
            others = [number(measures["detail_retention"]), number(measures["warping_error"], 3)]
            seams = [number(measures[key], 3) for key in ("seam_luma", "seam_detail", "judder")]
            rows.append((f"{name}, {mode}", *over_time, *others, number(measures["flow_magnitude"]), *seams))
    return markdown_table(header, rows)


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
    tables = [motion_table(motions), opposites_table(motions)]
    if videos:
        tables.append(videos_table(videos))
    print(*tables, sep="\n\n")
    content = {
        "settings": settings_of(arguments),
        "motions": {name: result.as_json() for name, result in motions.items()},
        "videos": videos,
    }
    say(f"written to {write_results('motion', content, arguments.output)}")


def _present_opposites(motions: dict[str, PromptResult]) -> Iterator[tuple[str, str, str]]:
    return (entry for entry in OPPOSITES if entry[0] in motions and entry[1] in motions)


if __name__ == "__main__":
    main()
