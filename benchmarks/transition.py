"""Do synthetic references look like what Stage I really makes? Spectra of motion references, and pictures.

Command: ``python -m benchmarks.transition --model wan2.2 --clips DIR --frames 33 [--pictures DIR]``.
Clips: the held-back ones of ``DIR/INDEX.csv``, cropped at the center. For each clip, at Stage I's size:

- reduced: the clip itself, what a Stage II without stage-transition is trained on;
- transition SIGMA: the clip noised to SIGMA and denoised again by Stage I (`swifti2v.training.refiner.transition`);
- Stage I: its own video of the clip's first frame and caption, what Stage II meets at inference.

Spectrum: power of luma over rings of equal spatial frequency (Hann window), in decibels, mean over the frames 1.. and
the clips. Distance: root mean square difference of two spectra in decibels over the rings above a quarter of the
Nyquist frequency, where artifacts live. Follows: PSNR against the clip, frames 1..; it falls as the motion is lost.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from benchmarks import pictures
from benchmarks.clips import held_back_clips, truth_frames
from benchmarks.results import (
    add_result_arguments,
    markdown_table,
    mean,
    number,
    png_of,
    say,
    settings_of,
    write_results,
)
from swifti2v.evaluation.metrics import psnr
from swifti2v.geometry import Size
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.settings import GenerationSettings
from swifti2v.training.refiner.encoding import resized
from swifti2v.training.refiner.transition import lightly_denoised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.runner.parts import Parts

Array = np.ndarray[Any, Any]

NUM_RINGS = 24
FINE_FROM = 0.25
REDUCED, REAL = "reduced", "Stage I"
LUMA = np.array([0.299, 0.587, 0.114])
FLOOR = 1e-3
ENLARGEMENT = 2


def ring_spectrum(frame: Array) -> Array:
    """Return the power of luma of a frame uint8 [h, w, 3] over rings of spatial frequency, in decibels: [NUM_RINGS].

    Ring k spans ``k .. k + 1`` of NUM_RINGS parts of the way from 0 to the Nyquist frequency along an axis.
    """
    luma = frame.astype(np.float64) @ LUMA
    height, width = luma.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2 / window.sum()
    radius = 2 * np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    rings = np.minimum((radius * NUM_RINGS).astype(int), NUM_RINGS)
    sums = np.bincount(rings.ravel(), power.ravel(), NUM_RINGS + 1)
    counts = np.bincount(rings.ravel(), minlength=NUM_RINGS + 1)
    return np.asarray(10 * np.log10(sums / np.maximum(counts, 1) + FLOOR)[:NUM_RINGS])


def spectral_distance(one: Array, other: Array) -> float:
    """Return the root mean square difference of two spectra in decibels, over the fine rings."""
    fine = slice(int(FINE_FROM * NUM_RINGS), None)
    return float(np.sqrt(np.mean((one[fine] - other[fine]) ** 2)))


@dataclass
class Kind:
    """What is gathered of one kind of motion reference over the clips."""

    spectra: list[Array] = field(default_factory=list)
    follows: list[float] = field(default_factory=list)

    def add(self, frames: Array, clip: Array) -> None:
        """Add a motion reference uint8 [F, h, w, 3] made of or for `clip`."""
        self.spectra.append(np.mean([ring_spectrum(frame) for frame in frames[1:]], axis=0))
        pairs = zip(frames[1:], clip[1:], strict=True)
        self.follows.append(mean(psnr(made, true) for made, true in pairs))

    @property
    def spectrum(self) -> Array:
        """Mean over the clips, in decibels."""
        return np.asarray(np.mean(self.spectra, axis=0))


def motion_references(parts: Parts, clip: Array, caption: str, sigmas: list[float]) -> dict[str, Array]:
    """Return the motion references of a clip uint8 [F, h, w, 3] at Stage I's size, by their kind."""
    frames = torch.from_numpy(clip)
    embeds = parts.stage_one.encode_prompt(caption)
    made: dict[str, Array] = {REDUCED: clip}
    for sigma in sigmas:
        redrawn = lightly_denoised(parts.stage_one, frames, embeds, sigma=sigma, seed=0)
        made[f"transition {sigma:g}"] = redrawn.numpy()
    _height, _width = clip.shape[1:3]
    pieces = parts.stage_one.generate(
        PIL.Image.fromarray(clip[0]),
        embeds,
        GenerationSettings(num_frames=len(clip)),
        size=Size(clip.shape[2], clip.shape[1]),
    )
    made[REAL] = torch.cat(list(pieces)).numpy()
    return made


def run(arguments: argparse.Namespace) -> tuple[dict[str, Kind], list[Array]]:
    """Make and measure the motion references of every clip; return them by kind, and a row of pictures a clip."""
    parts = TwoStagePipeline.from_pretrained(arguments.model).parts
    size = Size.parse(arguments.size)
    kinds: dict[str, Kind] = {}
    rows = []
    items = held_back_clips(arguments.clips)[: arguments.max_clips]
    for position, item in enumerate(items, start=1):
        clip = resized(truth_frames(item.path, size, arguments.frames), parts.motion_size(size))
        made = motion_references(parts, clip, item.caption, arguments.sigmas)
        for name, frames in made.items():
            kinds.setdefault(name, Kind()).add(frames, clip)
        rows.append(_row(made))
        say(f"{position}/{len(items)} {item.path.stem}")
    return kinds, rows


def table(kinds: Mapping[str, Kind]) -> str:
    """Return the Markdown table of the kinds."""
    real, reduced = kinds[REAL].spectrum, kinds[REDUCED].spectrum
    rows = [
        (
            name,
            number(spectral_distance(kind.spectrum, real)),
            number(spectral_distance(kind.spectrum, reduced)),
            "-" if name == REDUCED else number(mean(kind.follows)),
        )
        for name, kind in kinds.items()
    ]
    header = ("motion reference", "dB from Stage I's spectrum", "dB from the clip's", "follows the clip, dB")
    return markdown_table(header, rows)


def plot(kinds: Mapping[str, Kind]) -> Array:
    """Return the spectra as a picture uint8 [H, W, 3]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    frequency = (np.arange(NUM_RINGS) + 0.5) / NUM_RINGS
    for name, kind in kinds.items():
        axes.plot(frequency, kind.spectrum, label=name, linewidth=2.5 if name in {REDUCED, REAL} else 1.3)
    axes.set(xlabel="spatial frequency / Nyquist", ylabel="power of luma, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    picture: Array = png_of(figure)
    return picture


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a checkpoint with a Stage I of Wan")
    parser.add_argument("--clips", type=Path, required=True, help="folder with INDEX.csv")
    parser.add_argument("--size", default="1280x704", help="of the output; the motion reference follows from it")
    parser.add_argument("--frames", type=int, default=33, help="4k+1")
    parser.add_argument("--sigmas", type=float, nargs="*", default=[0.2, 0.4, 0.625, 0.9375])
    parser.add_argument("--max-clips", type=int, help="only the first clips, for a quick look")
    add_result_arguments(parser)
    arguments = parser.parse_args()
    with torch.no_grad():
        kinds, rows = run(arguments)
    print(table(kinds))
    if arguments.pictures:
        pictures.save(pictures.sheet(rows), arguments.pictures / "transition.png")
        pictures.save(plot(kinds), arguments.pictures / "transition_spectra.png")
    content = {
        "settings": settings_of(arguments),
        "kinds": {name: {"spectrum": kind.spectrum.tolist(), "follows": kind.follows} for name, kind in kinds.items()},
    }
    say(f"written to {write_results('transition', content, arguments.output)}")


def _row(made: Mapping[str, Array]) -> Array:
    """Return the last frame of every kind, the center enlarged."""
    panels = []
    for name, frames in made.items():
        height, width = frames.shape[1:3]
        cut = frames[-1, height // 4 : -height // 4, width // 3 : -width // 3]
        panels.append(pictures.Panel(name, pictures.enlarged(cut, ENLARGEMENT)))
    return pictures.row(panels)


if __name__ == "__main__":
    main()
