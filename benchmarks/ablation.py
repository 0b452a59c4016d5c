"""What each part of Conditional Segment-wise Generation is worth, on clips with known truth, in one command.

Command: ``make ablation CLIPS=DIR``, or ``python -m benchmarks.ablation --clips DIR [--network LABEL=FOLDER ...]``.
Of a Stage II of your own, on its device and at its size: ``make ablation CLIPS=DIR MODEL=RUN/checkpoint SIZE=2560x1408
DEVICE=cuda DOCUMENT=my.md``; a document that does not exist is begun, and the plot is written beside it.
Clips, motion references and measures are those of `benchmarks.baselines`. A row changes one thing of the checkpoint's
own way (M targets, one finished neighbor before them, the anchor); one network serves all rows but those of
``--network``, whose folders hold a transformer that was trained in another way (`swifti2v.training`). Memory is given
as the largest window in latent frames, which is what it grows with.

The table is written between the marks of the document, a plot beside it; words there are written by hand.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import pictures
from benchmarks.baselines import Baseline, judged, made_frames, means
from benchmarks.fidelity import add_clip_arguments, embedded_caption, known_clips
from benchmarks.results import (
    add_result_arguments,
    markdown_table,
    number,
    png_of,
    say,
    settings_of,
    write_between,
    write_results,
)
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.stage_two import StageTwo
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.fidelity import Array, KnownClip, Numbers
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings

DOCUMENT = Path(__file__).parents[1] / "docs" / "ablation.md"
PICTURE = Path("images") / "ablation.png"
"""Beside the document."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WHOLE = 10_000
"""Targets of a segment that no clip exceeds: the full sequence at once."""


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Args:
        name: key of the results.
        label: in the table.
        settings: of the generation, where they differ from the checkpoint's.
        uses_reference: False for the enlarged motion reference in place of the transported one.
        network: label of ``--network``; None for the checkpoint's own.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses_reference: bool = True
    network: str | None = None


FULL = Variant("full", "**full CSG**")
VARIANTS = (
    FULL,
    Variant("no_anchor", "no anchor", {"anchor": False}),
    Variant("no_neighbors", "no neighbors", {"neighbors_before": 0}),
    Variant("neither", "neither anchor nor neighbors", {"anchor": False, "neighbors_before": 0}),
    Variant("both_sides", "neighbors on both sides", {"neighbors_after": 1}),
    Variant("two_before", "two neighbors before", {"neighbors_before": 2}),
    Variant("compact", "compact positions", {"positions": "compact"}),
    *(Variant(f"m{size}", f"M = {size}", {"segment_size": size}) for size in (1, 2, 4, 5, 6)),
    Variant("whole", "full sequence", {"segment_size": WHOLE}),
    *(Variant(f"steps{steps}", f"{steps} steps", {"num_inference_steps": steps}) for steps in (2, 4, 8, 20)),
    Variant("bicubic", "bicubic reference (the paper's)", uses_reference=False),
)
COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "high_frequency_ratio": ("HF", 3),
    "seam_luma": ("seam, luma", 3),
    "seam_detail": ("seam, detail", 3),
    "drift_sharpness": ("drift, sharpness (%)", 2),
    "drift_saturation": ("drift, saturation (%)", 2),
    "seconds_per_frame": ("s/frame", 2),
    "window": ("window", 0),
}


def changed_clip(variant: Variant, clip: KnownClip) -> KnownClip:
    """Return the clip with the reference of a variant."""
    return clip if variant.uses_reference else replace(clip, reference=clip.bicubic)


def with_network(parts: Parts, folder: Path) -> Parts:
    """Return the parts of a checkpoint with another transformer of Stage II."""
    two = parts.stage_two
    transformer = StageTwoTransformer.from_pretrained(folder, torch_dtype=two.transformer.dtype)
    transformer = transformer.to(parts.device).eval()
    return replace(parts, stage_two=StageTwo(transformer, two.codec, uses_prompt=two.uses_prompt))


def measured(
    variant: Variant, clip: KnownClip, parts: Parts, settings: GenerationSettings, prompt_embeds: torch.Tensor | None
) -> Numbers:
    """Return every measure of a variant on a clip, and the latent frames of its largest window."""
    row = Baseline(variant.name, variant.label, "stage_two", variant.settings)
    chosen = replace(settings, **variant.settings)
    frames, seconds = made_frames(row, changed_clip(variant, clip), parts, settings, prompt_embeds)
    size = min(chosen.segment_size, (len(frames) - 1) // 4)
    # One segment has no seams of its own, segments of one frame nothing but: judged where those of the full way are.
    seams = settings.segment_size if size == 1 or size * 4 + 1 >= len(frames) else size
    numbers = judged(variant.name, frames, clip, fps=settings.fps, segment_size=seams, vmaf=False)
    window = max(len(segment.window) for segment in parts.stage_two.plan(chosen))
    return {**numbers, "seconds_per_frame": seconds, "window": float(window)}


def run(
    arguments: argparse.Namespace, variants: Sequence[Variant], networks: Mapping[str, Path]
) -> dict[str, dict[str, Numbers]]:
    """Measure every variant on every clip; return ``{clip: {variant: numbers}}``."""
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    parts = TwoStagePipeline.from_pretrained(arguments.model, device=arguments.device, dtype=dtype).parts
    others = {label: with_network(parts, folder) for label, folder in networks.items()}
    results: dict[str, dict[str, Numbers]] = {}
    for item, clip, settings in known_clips(parts, arguments):
        embeds = embedded_caption(parts, item)
        rows = results[item.path.stem] = {}
        for variant in variants:
            chosen = parts if variant.network is None else others[variant.network]
            rows[variant.name] = measured(variant, clip, chosen, settings, embeds)
            say(f"{item.path.stem}, {variant.label}: {number(rows[variant.name]['psnr'], 3)} dB")
    return results


def table(results: Mapping[str, Mapping[str, Numbers]], variants: Sequence[Variant]) -> str:
    """Return the Markdown table of the means, with the difference to the first row and its spread over the clips."""
    averages = means(results)
    header = (
        f"mean of {len(results)} clips", "against the first, dB", *(heading for heading, _digits in COLUMNS.values()),
    )  # fmt: skip
    rows = []
    for variant in variants:
        differences = differences_of(results, variant)
        gained = f"{np.mean(differences):+.3f} ± {np.std(differences):.3f}" if variant is not variants[0] else "-"
        cells = [number(averages[variant.name].get(key), digits) for key, (_heading, digits) in COLUMNS.items()]
        rows.append((variant.label, gained, *cells))
    return markdown_table(header, rows)


def differences_of(results: Mapping[str, Mapping[str, Numbers]], variant: Variant) -> list[float]:
    """Return what a variant gains over the full way in PSNR, clip by clip."""
    return [clip[variant.name]["psnr"] - clip[FULL.name]["psnr"] for clip in results.values()]


def plot(results: Mapping[str, Mapping[str, Numbers]], variants: Sequence[Variant]) -> Array:
    """Return the differences to the full way as a picture uint8 [H, W, 3]: PSNR with its spread, and seams."""
    from matplotlib.figure import Figure

    averages = means(results)
    shown = [variant for variant in variants if variant is not FULL]
    places = np.arange(len(shown))
    figure = Figure(figsize=(10, 0.34 * len(shown) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    differences = [differences_of(results, variant) for variant in shown]
    left.barh(places, [np.mean(d) for d in differences], xerr=[np.std(d) for d in differences], color="#4878a8")
    left.set_yticks(places, [variant.label for variant in shown])
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("PSNR against full CSG, dB (bar: spread over clips)")
    right.scatter([averages[variant.name].get("seam_detail", np.nan) for variant in shown], places, color="#a85448")
    right.axvline(averages[FULL.name].get("seam_detail", np.nan), color="black", linewidth=0.8)
    right.set_xlabel("seam ratio of detail (line: full CSG)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    picture: Array = png_of(figure)
    return picture


def write_document(path: Path, content: str, picture: Array) -> None:
    """Put the table between the marks of a document, which is begun if there is none, and the plot beside it."""
    if not path.exists():
        text = f"# Ablation\n\n{BEGIN}\n{END}\n\n![PSNR and seams of each variant]({PICTURE.as_posix()})\n"
        path.write_text(text, encoding="utf-8")
    write_between(path, content, begin=BEGIN, end=END)
    (path.parent / PICTURE).parent.mkdir(exist_ok=True)
    pictures.save(picture, path.parent / PICTURE)


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line (or what is given in its place), measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clip_arguments(parser)
    parser.add_argument("--network", nargs="*", default=[], metavar="LABEL=FOLDER", help="a row for each")
    parser.add_argument("--device", help="default: the CUDA device if there is one, else the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks; default: that of the device")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced, or that is begun")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args(given)
    networks = {label: Path(folder) for label, _, folder in (entry.partition("=") for entry in arguments.network)}
    variants = [*VARIANTS, *(Variant(label, label, network=label) for label in networks)]
    with torch.no_grad():
        results = run(arguments, variants, networks)
    made = table(results, variants)
    print(made)
    if arguments.document is not None:
        write_document(arguments.document, made, plot(results, variants))
    content = {"settings": settings_of(arguments), "results": results, "mean": means(results)}
    say(f"written to {write_results('ablation', content, arguments.output)}")


if __name__ == "__main__":
    main()
