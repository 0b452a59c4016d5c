"""How near the system comes to the truth, on real clips that training never saw.

Command: ``python -m benchmarks.fidelity --model mini --clips DIR --frames 33 [--pictures DIR]``.
Clips: those of ``DIR/INDEX.csv`` at least 1152 pixels wide, the first frames, cropped at the center. Motion reference:
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from benchmarks import pictures
from benchmarks.clips import REDUCTION, held_back_clips, truth_frames
from benchmarks.results import add_result_arguments, markdown_table, mean, number, say, settings_of, write_results
from swifti2v.evaluation.evenness import split_error
from swifti2v.evaluation.metrics import high_frequency_energy, psnr
from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8, to_uint8
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.replace import replace_first_frame
from swifti2v.reference.resample import reduce_frames
from swifti2v.reference.transport import transport_with_confidence
from swifti2v.runner.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.data.sources import MediaItem
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings

Array = np.ndarray[Any, Any]
Numbers = dict[str, float]

VARIANTS = ("bicubic", "reference", "codec", "stage_two")
LABELS = {"bicubic": "bicubic", "codec": "reference, coded", "stage_two": "with Stage II"}
LANCZOS = cv2.INTER_LANCZOS4
EXPLAINED_FROM = 0.5
CROP = Size(160, 160)
CROP_ENLARGEMENT = 2


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


def scores(frames: Sequence[Array], clip: KnownClip, energies: Sequence[float]) -> Numbers:
    """Return the measures of a video, frames uint8 [H, W, 3]; `energies` are the truth's, frame by frame."""
    later = range(1, len(frames))
    decibels = [psnr(frames[t], clip.truth[t]) for t in later]
    ratios = [high_frequency_energy(frames[t]) / energies[t] if energies[t] > 0 else float("nan") for t in later]
    errors = [split_error(frames[t], clip.truth[t], clip.unexplained[t]) for t in later]
    error, count = np.sum(errors, axis=0)[0]
    return {
        "psnr": mean(decibels),
        "psnr_worst": min(decibels),
        "high_frequency_ratio": mean(ratios),
        "psnr_unexplained": float(-10 * np.log10(error / count)) if error > 0 else float("nan"),
        "psnr_first_frame": psnr(frames[0], clip.truth[0]),
    }


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
        energies = [high_frequency_energy(frame) for frame in clip.truth]
        numbers: dict[str, Numbers] = {}
        kept = {}
        for variant in VARIANTS:
            begun = time.perf_counter()
            frames = list(variant_frames(variant, clip, parts, settings, embeds))
            seconds = (time.perf_counter() - begun) / len(frames)
            numbers[variant] = scores(frames, clip, energies) | {"seconds_per_frame": seconds}
            kept[variant] = frames[last]
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
    print(table(results, arguments.reference))
    content = {"settings": settings_of(arguments), "results": results, "mean": means(results)}
    theme = "fidelity" if arguments.reference == "transport" else "fidelity_replace"
    say(f"written to {write_results(theme, content, arguments.output)}")


def _on(device: torch.device, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    return (chunk.to(device) for chunk in chunks)


if __name__ == "__main__":
    main()
