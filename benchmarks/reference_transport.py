"""How near the transported reference comes to the truth, on real clips, clean and damaged.

Command: ``python -m benchmarks.reference_transport --clips DIR [--frames 25] [--size 1280x704] [--damages all]``.
Truth = the first frames of each clip at least as large as the size, center-cropped; motion reference = the truth
reduced four times (antialiased bicubic, uint8), optionally damaged. Prints a table; writes
``benchmarks/results/reference_transport_<hardware>_<date>.json``. PSNR: mean over clips of the mean over frames 1.. .
HF: high-frequency energy over the truth's (`swifti2v.evaluation.metrics.high_frequency_ratio`), the same means.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from benchmarks.clips import REDUCTION, truth_frames
from benchmarks.results import say, settings_of, write_results
from swifti2v.evaluation.metrics import high_frequency_energy, psnr
from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.resample import reduce_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_CLIPS = (
    "bbb_meadow_pan", "bbb_bird_branch", "bee_thistle", "butterfly_yellow_flowers", "dog_fetch", "cup_shuffle",
    "letter_blocks", "soccer_juggle", "tokyo_skyline_pan", "butterfly_monarch_loop",
)  # fmt: skip
VARIANTS = {
    "replace": ReferenceOptions(mode="replace"),
    "transport 0.25": ReferenceOptions(flow_scale=0.25, band_sigma=0.0),
    "transport 0.5": ReferenceOptions(flow_scale=0.5, band_sigma=0.0),
    "transport 1.0": ReferenceOptions(flow_scale=1.0, band_sigma=0.0),
    "transport 0.5 band 0.5": ReferenceOptions(band_sigma=0.5),
    "transport 0.5 band 1": ReferenceOptions(band_sigma=1.0),
}
DAMAGES = ("none", "noise", "drift", "soft", "swim", "all")
Row = dict[str, float]
Table = dict[str, dict[str, dict[str, Row]]]


def damaged(motion: np.ndarray, damage: str, seed: int = 0) -> np.ndarray:
    """Return a motion reference with the faults of a generated one (facts, prototypes 2): all frames, frame 0 too."""
    generator = np.random.default_rng(seed)
    height, width = motion.shape[1:3]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    frames = []
    for index, frame in enumerate(motion.astype(np.float32) / 255):
        image = frame
        if damage in ("swim", "all"):
            field = cv2.GaussianBlur(generator.standard_normal((height, width, 2)).astype(np.float32), (0, 0), 8)
            field *= 0.25 / field.std()
            places = columns + field[..., 0], rows + field[..., 1]
            image = cv2.remap(image, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        if damage in ("soft", "all"):
            image = cv2.GaussianBlur(image, (0, 0), 0.8)
        if damage in ("drift", "all"):
            image = (image - 0.5) * (1 + 0.03 * np.sin(index * 0.7)) + 0.5 + 0.03 * np.sin(index * 0.4)
        if damage in ("noise", "all"):
            image = image + 0.03 * generator.standard_normal(image.shape).astype(np.float32)
        frames.append((image.clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(frames)


def frames_of(motion: np.ndarray, truth: np.ndarray, options: ReferenceOptions) -> Iterator[np.ndarray]:
    """Yield the frames 1.. of the hybrid reference, float32 [H, W, 3] in [0, 1]."""
    image = from_uint8(truth[:1])[0, :, 0]
    for index, chunk in enumerate(hybrid_reference([torch.from_numpy(motion)], image, options=options)):
        if index:
            yield from ((chunk[0] + 1) / 2).permute(1, 2, 3, 0).contiguous().numpy()


def measure(motion: np.ndarray, truth: np.ndarray, energies: list[float], options: ReferenceOptions) -> Row:
    """Return PSNR, HF ratio, the worst frame's PSNR and seconds per frame (process CPU and wall)."""
    decibels, ratios, wall, cpu = [], [], 0.0, 0.0
    frames = frames_of(motion, truth, options)
    for index in range(1, len(truth)):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        frame = next(frames)
        wall += time.perf_counter() - wall_start
        cpu += time.process_time() - cpu_start
        decibels.append(psnr(frame, truth[index]))
        ratios.append(high_frequency_energy(frame) / energies[index])
    count = len(decibels)
    return {
        "psnr": float(np.mean(decibels)), "worst": min(decibels), "hf": float(np.mean(ratios)),
        "wall_seconds": wall / count, "cpu_seconds": cpu / count,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> Table:
    """Return ``{damage: {variant: {clip: numbers}}}``."""
    size = Size.parse(arguments.size)
    table: Table = {}
    for name in arguments.names:
        truth = truth_frames(arguments.clips / f"{name}.mp4", size, arguments.frames)
        clean = reduce_frames(truth, REDUCTION)
        energies = [high_frequency_energy(frame) for frame in truth]
        for damage in arguments.damages:
            motion = clean if damage == "none" else damaged(clean, damage)
            for variant in arguments.variants:
                numbers = measure(motion, truth, energies, VARIANTS[variant])
                table.setdefault(damage, {}).setdefault(variant, {})[name] = numbers
        say(f"# {name}")
    return table


def show(table: Table) -> None:
    """Print one line for each damage and variant: clips as dB/HF, then the means."""
    for damage, variants in table.items():
        print(f"\n## {damage}")
        for variant, clips in variants.items():
            cells = " ".join(f"{row['psnr']:.2f}/{row['hf']:.2f}" for row in clips.values())
            means = {key: float(np.mean([row[key] for row in clips.values()])) for key in ("psnr", "hf", "cpu_seconds")}
            tail = f"mean {means['psnr']:.2f} dB HF {means['hf']:.2f} {1000 * means['cpu_seconds']:.0f} CPU-ms/frame"
            print(f"{variant:24s} {cells} | {tail}")


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of mp4 files")
    parser.add_argument("--names", nargs="+", default=list(DEFAULT_CLIPS), help="clips, without .mp4")
    parser.add_argument("--size", default="1280x704")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--damages", nargs="+", default=["none"], choices=DAMAGES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    arguments = parser.parse_args()
    table = run(arguments)
    show(table)
    options = {name: asdict(VARIANTS[name]) for name in arguments.variants}
    content = {"settings": settings_of(arguments), "options": options, "results": table}
    say(f"written to {write_results('reference_transport', content, arguments.output)}")


if __name__ == "__main__":
    main()
