"""How near the system comes to the truth, on real clips that training never saw.

Command: ``python -m benchmarks.fidelity --model mini --clips DIR --frames 33 [--pictures DIR]``.
Clips: those of ``DIR/INDEX.csv`` at least 1152 pixels wide, the first frames, cropped at the centre. Motion reference:
the truth reduced four times (antialiased bicubic, uint8), so that Stage I is left out. Every variant is judged in eight
bits. One clip is held in memory: about 0.6 GB for 33 frames of 1280x704.

- bicubic: the motion reference enlarged, without the image;
- reference: the hybrid reference, transported or (``--reference replace``) as the paper makes it;
- codec: that reference encoded and decoded by Stage II's codec;
- stage_two: that reference refined by Stage II with the checkpoint's settings, decoded.

PSNR: mean over the frames 1.. . HF: high-frequency energy, the mean square of luma less luma blurred by a Gaussian of 2
pixels, over the truth's; mean over the frames 1.. . Unexplained: places where transport's confidence is below 0.5; PSNR
there is of the mean squared error over all such places of the clip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from benchmarks import pictures
from benchmarks.clips import REDUCTION, held_back_clips, truth_frames
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
from swifti2v.evaluation.metrics import high_frequency_energy, psnr
from swifti2v.geometry import Size
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.pixels import from_uint8, to_uint8
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.replace import replace_first_frame
from swifti2v.reference.resample import reduce_frames
from swifti2v.reference.transport import transport_with_confidence

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.data.sources import MediaItem
    from swifti2v.pipelines.loading import Parts
    from swifti2v.settings import GenerationSettings

Array = np.ndarray[Any, Any]
Numbers = dict[str, float]

VARIANTS = ("bicubic", "reference", "codec", "stage_two")
LABELS = {"bicubic": "bicubic", "codec": "reference, coded", "stage_two": "with Stage II"}
LANCZOS = cv2.INTER_LANCZOS4
EXPLAINED_FROM = 0.5
CROP = Size(160, 160)
CROP_ENLARGEMENT = 2


@dataclass
class Score:
    """Running measures of one variant of one clip."""

    decibels: list[float] = field(default_factory=list)
    energy_ratios: list[float] = field(default_factory=list)
    unexplained_error: float = 0.0
    unexplained_count: int = 0
    first_frame: float = float("nan")
    seconds: float = 0.0

    def add(self, frame: Array, truth: Array, *, energy: float, unexplained: Array) -> None:
        """Judge a frame uint8 [H, W, 3]; `energy` is the truth's, `unexplained` [H, W] bool."""
        self.decibels.append(psnr(frame, truth))
        self.energy_ratios.append(high_frequency_energy(frame) / energy if energy > 0 else float("nan"))
        difference = (frame[unexplained].astype(np.float64) - truth[unexplained]) / 255
        self.unexplained_error += float((difference**2).sum()) / 3
        self.unexplained_count += int(unexplained.sum())

    def numbers(self) -> Numbers:
        """Return the measures of the clip."""
        error = self.unexplained_error / self.unexplained_count if self.unexplained_count else float("nan")
        return {
            "psnr": mean(self.decibels),
            "psnr_worst": min(self.decibels),
            "high_frequency_ratio": mean(self.energy_ratios),
            "psnr_unexplained": float(-10 * np.log10(error)) if error > 0 else float("nan"),
            "psnr_first_frame": self.first_frame,
            "seconds_per_frame": self.seconds / (1 + len(self.decibels)),
        }


@dataclass(frozen=True)
class KnownClip:
    """A clip, what Stage I would give of it, and the hybrid reference.

    Args:
        truth: uint8 [F, H, W, 3]; its frame 0 is the image.
        motion: the motion reference, uint8 [F, h, w, 3].
        bicubic: chunks [1, 3, f, H, W] of the enlarged motion reference (frame 0 is the image).
        reference: chunks of the hybrid reference.
        unexplained: [F, H, W] bool.
        seconds: what making `bicubic` and `reference` took, by these names.
    """

    truth: Array
    motion: Array
    bicubic: list[Tensor]
    reference: list[Tensor]
    unexplained: Array
    seconds: Numbers


def known_clip(truth: Array, settings: GenerationSettings) -> KnownClip:
    """Make the references of a truth uint8 [F, H, W, 3]."""
    reduced = reduce_frames(truth, REDUCTION)
    motion = [torch.from_numpy(reduced)]
    image = from_uint8(truth[:1])[0, :, 0]
    options = ReferenceOptions(flow_scale=settings.flow_scale)
    begun = time.perf_counter()
    transported = list(transport_with_confidence(motion, image, options=options))
    seconds = {"reference": time.perf_counter() - begun}
    confidence = torch.cat([chunk.confidence for chunk in transported], dim=2)[0, 0]
    begun = time.perf_counter()
    bicubic = list(replace_first_frame(motion, image))
    seconds["bicubic"] = time.perf_counter() - begun
    chunks = [chunk.frames for chunk in transported]
    if settings.reference == "replace":
        chunks, seconds["reference"] = bicubic, seconds["bicubic"]
    return KnownClip(truth, reduced, bicubic, chunks, (confidence < EXPLAINED_FROM).numpy(), seconds)


def variant_frames(
    variant: str, clip: KnownClip, parts: Parts, settings: GenerationSettings, prompt_embeds: Tensor | None
) -> Iterator[Array]:
    """Yield the frames of a variant, uint8 [H, W, 3], frame 0 first.

    Besides `VARIANTS`: lanczos (as bicubic, by OpenCV's 8x8 window) and still (the image, the same array each time).
    """
    if variant == "still":
        yield from repeat(clip.truth[0], len(clip.truth))
        return
    if variant == "lanczos":
        yield clip.truth[0]
        yield from (cv2.resize(small, clip.truth.shape[2:0:-1], interpolation=LANCZOS) for small in clip.motion[1:])
        return
    codec = parts.stage_two.codec
    pieces: Iterable[Tensor]
    if variant == "bicubic":
        pieces = map(to_uint8, clip.bicubic)
    elif variant == "reference":
        pieces = map(to_uint8, clip.reference)
    elif variant == "codec":
        pieces = codec.decode_stream(codec.encode_stream(_on(parts.device, clip.reference)))
    else:
        refined = parts.stage_two.refine(_on(parts.device, clip.reference), settings, prompt_embeds=prompt_embeds)
        pieces = codec.decode_stream(item.latents for item in refined)
    for piece in pieces:
        yield from piece.cpu().numpy()


def measure(
    clip: KnownClip, variants: dict[str, Iterator[Array]], picture_frame: int
) -> tuple[dict[str, Numbers], dict[str, Array]]:
    """Return the measures of each variant, and its frame of index `picture_frame`."""
    energies = [high_frequency_energy(frame) for frame in clip.truth]
    results, kept = {}, {}
    for variant, frames in variants.items():
        score = Score()
        begun = time.perf_counter()
        for index, frame in enumerate(frames):
            score.seconds += time.perf_counter() - begun
            if index == 0:
                score.first_frame = psnr(frame, clip.truth[0])
            else:
                score.add(frame, clip.truth[index], energy=energies[index], unexplained=clip.unexplained[index])
            if index == picture_frame:
                kept[variant] = frame.copy()
            begun = time.perf_counter()
        results[variant] = score.numbers()
    return results, kept


def crop_row(name: str, clip: KnownClip, kept: dict[str, Array], index: int) -> Array:
    """Return input, bicubic, ours and truth at the place where bicubic and ours differ most."""
    truth = clip.truth[index]
    place = pictures.most_different_place(kept["bicubic"], kept["stage_two"], CROP)
    source = pictures.followed(place, clip.truth[0], truth)

    def panel(label: str, frame: Array, at: pictures.Place = place) -> pictures.Panel:
        return pictures.Panel(label, pictures.enlarged(at.of(frame), CROP_ENLARGEMENT))

    def with_decibels(label: str, frame: Array) -> str:
        return f"{label}, {psnr(place.of(frame), place.of(truth)):.1f} dB"

    height = CROP.height * CROP_ENLARGEMENT
    whole = pictures.fitted(pictures.marked(truth, place, 8), round(height * truth.shape[1] / truth.shape[0]))
    return pictures.row(
        [
            pictures.Panel(f"{name}, frame {index}", whole),
            panel("input, same content", clip.truth[0], source),
            panel(with_decibels("bicubic", kept["bicubic"]), kept["bicubic"]),
            panel(with_decibels("ours", kept["stage_two"]), kept["stage_two"]),
            panel("truth", truth),
        ]
    )


def known_clips(
    parts: Parts, arguments: argparse.Namespace
) -> Iterator[tuple[MediaItem, KnownClip, GenerationSettings]]:
    """Yield the clips that the arguments of `add_clip_arguments` ask for, and tell what each took its reader."""
    size = Size.parse(arguments.size)
    items = held_back_clips(arguments.clips)[: arguments.max_clips]
    for position, item in enumerate(items, start=1):
        begun = time.perf_counter()
        truth = truth_frames(item.path, size, arguments.frames)
        settings = parts.defaults.settled(
            {
                "size": size,
                "num_frames": len(truth),
                "num_inference_steps": arguments.steps,
                "reference": arguments.reference,
            }
        )
        yield item, known_clip(truth, settings), settings
        say(f"{position}/{len(items)} {item.path.stem}: {time.perf_counter() - begun:.0f} s")


def run(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every clip; return ``{clip: {"unexplained_share": ..., variant: numbers}}``."""
    parts = TwoStagePipeline.from_pretrained(arguments.model).parts
    results: dict[str, dict[str, Any]] = {}
    rows = []
    for item, clip, settings in known_clips(parts, arguments):
        embeds = embedded_caption(parts, item)
        last = len(clip.truth) - 1
        variants = {name: variant_frames(name, clip, parts, settings, embeds) for name in VARIANTS}
        numbers, kept = measure(clip, variants, last)
        name = item.path.stem
        results[name] = {"num_frames": last + 1, "unexplained_share": float(clip.unexplained[1:].mean()), **numbers}
        if arguments.pictures:
            rows.append(crop_row(name, clip, kept, last))
            pictures.save(rows[-1], arguments.pictures / f"fidelity_{name}.png")
    if rows:
        pictures.save(pictures.sheet(rows), arguments.pictures / "fidelity.jpg")
    return results


def embedded_caption(parts: Parts, item: MediaItem) -> Tensor | None:
    """Return the embedded caption of a clip, for a Stage II that was trained with prompts."""
    return parts.stage_one.encode_prompt(item.caption).prompt if parts.stage_two.uses_prompt else None


def means(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over the clips, in the form of a clip's results."""
    clips = list(results.values())
    combined: dict[str, Any] = {"unexplained_share": mean(clip["unexplained_share"] for clip in clips)}
    for variant in VARIANTS:
        combined[variant] = {key: mean(clip[variant][key] for clip in clips) for key in clips[0][variant]}
    return combined


def table(results: dict[str, dict[str, Any]], reference: str) -> str:
    """Return the Markdown table: a row for each clip, then the mean."""
    labels = LABELS | {"reference": "transported reference" if reference == "transport" else "hybrid reference"}
    header = (
        "clip (dB / HF)", *(labels[variant] for variant in VARIANTS),
        "unexplained", "there, coded", "there, Stage II", "first frame",
    )  # fmt: skip
    rows = []
    for name, clip in [*results.items(), ("**mean**", means(results))]:
        cells = [f"{number(clip[v]['psnr'])} / {number(clip[v]['high_frequency_ratio'])}" for v in VARIANTS]
        there = [number(clip[v]["psnr_unexplained"]) for v in ("codec", "stage_two")]
        share = f"{100 * clip['unexplained_share']:.0f}%"
        rows.append((name, *cells, share, *there, number(clip["stage_two"]["psnr_first_frame"])))
    return markdown_table(header, rows)


def checks(results: dict[str, dict[str, Any]], reference: str) -> list[Check]:
    """Compare with what is required of `mini`."""
    mean_of = means(results)
    two, bicubic = mean_of["stage_two"], mean_of["bicubic"]
    gain = two["psnr"] - bicubic["psnr"]
    reference_gain = mean_of["reference"]["psnr"] - bicubic["psnr"]
    there = two["psnr_unexplained"] - mean_of["codec"]["psnr_unexplained"]
    first = min(clip["stage_two"]["psnr_first_frame"] for clip in results.values())
    ratio = two["high_frequency_ratio"]
    needed = [Check("first frame >= 34 dB (worst clip)", f"{number(first)} dB", judged(first, at_least=34))]
    if reference == "transport":
        gained = f"{reference_gain:+.2f} dB"
        needed.append(Check("transported reference >= bicubic + 5 dB", gained, judged(reference_gain, at_least=5)))
    return [
        *needed,
        Check("with Stage II >= bicubic + 4 dB", f"{gain:+.2f} dB", judged(gain, at_least=4)),
        Check("with Stage II, HF 0.75 .. 1.1", number(ratio), judged(ratio, at_least=0.75, at_most=1.1)),
        Check("Stage II > coded reference where unexplained", f"{there:+.2f} dB", judged(there, at_least=1e-9)),
    ]


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `known_clips` reads."""
    parser.add_argument("--model", default="mini", help="name or folder of a checkpoint")
    parser.add_argument("--clips", type=Path, required=True, help="folder with INDEX.csv")
    parser.add_argument("--size", default="1280x704")
    parser.add_argument("--frames", type=int, default=33, help="4k+1")
    parser.add_argument("--steps", type=int, help="of Stage II; default: the checkpoint's")
    parser.add_argument("--reference", choices=("transport", "replace"), default="transport")
    parser.add_argument("--max-clips", type=int, help="only the first clips, for a quick look")


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clip_arguments(parser)
    add_result_arguments(parser)
    arguments = parser.parse_args()
    with torch.no_grad():
        results = run(arguments)
    judgements = checks(results, arguments.reference)
    print(table(results, arguments.reference), checks_table(judgements), sep="\n\n")
    content = {"settings": settings_of(arguments), "results": results, "mean": means(results)}
    content["checks"] = [vars(check) for check in judgements]
    theme = "fidelity" if arguments.reference == "transport" else "fidelity_replace"
    say(f"written to {write_results(theme, content, arguments.output)}")


def _on(device: torch.device, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    return (chunk.to(device) for chunk in chunks)


if __name__ == "__main__":
    main()
