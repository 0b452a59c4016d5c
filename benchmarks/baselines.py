"""Ours beside what it has to beat, and beside itself with parts left out, in one table.

Command: ``python -m benchmarks.baselines --clips DIR --frames 33 [--size 1280x704]``. Clips and motion reference are
those of `benchmarks.fidelity`: real clips that training never saw, the truth reduced four times in place of Stage I.
Everything is judged in eight bits by the measures of ``swifti2v evaluate`` (`swifti2v.evaluation.registry` says what
they mean); likeness to the truth is the mean over the frames 1.., because frame 0 of every row is the image. Numbers of
the table are means over the clips. One clip is held in memory: about 1 GB for 33 frames of 1280x704.

- bicubic, Lanczos: the motion reference enlarged, without the image;
- reference: the hybrid reference alone, and encoded and decoded by Stage II's codec;
- ours: with the checkpoint's settings; without neighbors, so that segments do not know of each other; without the
  anchor, so that the image is seen through the reference only (the checkpoint was not trained for that);
- still image: the image repeated, which no measure of steadiness can tell from a perfect video;
- truth: what seams, warping error, drift and flicker of the other rows are to be read beside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.fidelity import add_clip_arguments, embedded_caption, known_clips, variant_frames
from benchmarks.results import add_result_arguments, markdown_table, mean, number, say, settings_of, write_results
from swifti2v.evaluation.sources import FrameSource
from swifti2v.evaluation.video import Standard, judge_video
from swifti2v.evaluation.vmaf import MISSING, open_vmaf
from swifti2v.geometry import Size
from swifti2v.runner.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from benchmarks.fidelity import Array, KnownClip, Numbers
    from swifti2v.evaluation.results import VideoResult
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings

TRUTH = "truth"


@dataclass(frozen=True)
class Baseline:
    """A row of the table.

    Args:
        name: key of the results.
        label: in the table.
        variant: of `variant_frames`, or `truth`.
        settings: of the generation, where they are not the checkpoint's.
        starts_from: what is made before the variant itself, a key of `KnownClip.seconds`; None for nothing.
    """

    name: str
    label: str
    variant: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    starts_from: str | None = "reference"


BASELINES = (
    Baseline("bicubic", "bicubic", "bicubic", starts_from="bicubic"),
    Baseline("lanczos", "Lanczos", "lanczos", starts_from=None),
    Baseline("reference", "reference alone", "reference"),
    Baseline("codec", "reference, coded", "codec"),
    Baseline("ours", "**ours**", "stage_two"),
    Baseline("independent", "ours, independent segments", "stage_two", {"neighbors_before": 0, "neighbors_after": 0}),
    Baseline("no_anchor", "ours, without the anchor", "stage_two", {"anchor": False}),
    Baseline("still", "still image (control)", "still", starts_from=None),
    Baseline(TRUTH, "truth", TRUTH, starts_from=None),
)

LIKENESS = ("psnr", "ssim", "ms_ssim", "vmaf", "high_frequency_ratio")
"""Measures of which frame 0 would count for nothing but the image's own likeness to itself."""

COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 3),
    "ms_ssim": ("MS-SSIM", 4),
    "vmaf": ("VMAF", 1),
    "high_frequency_ratio": ("HF", 2),
    "seam_luma": ("seam, luma", 3),
    "seam_detail": ("seam, detail", 3),
    "warping_error": ("warping error", 3),
    "drift_sharpness": ("drift, sharpness (%)", 2),
    "drift_contrast": ("drift, contrast (%)", 2),
    "drift_saturation": ("drift, saturation (%)", 2),
    "flicker": ("flicker", 3),
    "seconds_per_frame": ("s/frame", 2),
}
"""Heading and digits of each column; the JSON holds every measure."""


def made_frames(
    row: Baseline, clip: KnownClip, parts: Parts, settings: GenerationSettings, prompt_embeds: torch.Tensor | None
) -> tuple[list[Array], float]:
    """Return the frames of a row, uint8 [H, W, 3], and the seconds per frame that they took (NaN for the truth)."""
    if row.variant == TRUTH:
        return list(clip.truth), float("nan")
    changed = replace(settings, **row.settings)
    begun = time.perf_counter()
    frames = list(variant_frames(row.variant, clip, parts, changed, prompt_embeds))
    seconds = time.perf_counter() - begun
    if row.starts_from is not None:
        seconds += clip.seconds[row.starts_from]
    return frames, seconds / len(frames)


def judged(
    label: str, frames: Sequence[Array], clip: KnownClip, *, fps: float, segment_size: int, vmaf: bool = True
) -> Numbers:
    """Return every measure of a video of which the truth is known; VMAF takes longer than all others together."""
    source = _source(label, frames, fps)
    truth = _source(TRUTH, list(clip.truth), fps)
    model = open_vmaf(source.size) if vmaf else None
    standard = Standard(image=clip.truth[0], truth=truth, segment_size=segment_size, vmaf=model)
    return later_frames(judge_video(source, standard))


def later_frames(result: VideoResult) -> Numbers:
    """Return the values of a video, those of `LIKENESS` as means over the frames 1.. ."""
    values = dict(result.values)
    for curve in result.curves:
        if curve.metric in LIKENESS:
            values[curve.metric] = mean(v for t, v in zip(curve.frames, curve.values, strict=True) if t > 0)
    return values


def run(arguments: argparse.Namespace) -> dict[str, dict[str, Numbers]]:
    """Measure every clip; return ``{clip: {row: numbers}}``."""
    parts = TwoStagePipeline.from_pretrained(arguments.model).parts
    results: dict[str, dict[str, Numbers]] = {}
    for item, clip, settings in known_clips(parts, arguments):
        embeds = embedded_caption(parts, item)
        rows = results[item.path.stem] = {}
        for row in BASELINES:
            frames, seconds = made_frames(row, clip, parts, settings, embeds)
            numbers = judged(row.name, frames, clip, fps=settings.fps, segment_size=settings.segment_size)
            rows[row.name] = {**numbers, "seconds_per_frame": seconds}
            say(f"{item.path.stem}, {row.name}: {number(numbers['psnr'])} dB, {number(seconds)} s a frame")
    return results


def means(results: Mapping[str, Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """Return the mean over the clips of every number of every row; of the clips where it is defined."""
    clips = list(results.values())
    return {
        row: {key: mean(clip[row].get(key) for clip in clips) for key in numbers} for row, numbers in clips[0].items()
    }


def table(results: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Return the Markdown table of the means."""
    averages = means(results)
    header = (f"mean of {len(results)} clips", *(heading for heading, _digits in COLUMNS.values()))
    rows = [
        (row.label, *(number(averages[row.name].get(key), digits) for key, (_heading, digits) in COLUMNS.items()))
        for row in BASELINES
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clip_arguments(parser)
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    if open_vmaf(Size.parse(arguments.size)) is None:
        say(MISSING)
    with torch.no_grad():
        results = run(arguments)
    print(table(results))
    content = {"settings": settings_of(arguments), "results": results, "mean": means(results)}
    say(f"written to {write_results('baselines', content, arguments.output)}")


def _source(label: str, frames: Sequence[Array], fps: float) -> FrameSource:
    def generate() -> Generator[Array]:
        yield from frames

    height, width = frames[0].shape[:2]
    return FrameSource(label, Size(width, height), fps, generate, num_frames=len(frames))


if __name__ == "__main__":
    main()
