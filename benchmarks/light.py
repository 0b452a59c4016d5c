"""What `light` gains on real clips that training never saw, on clean and on damaged motion references.

```
python -m benchmarks.light --clips DIR [--rivals FOLDER]
```

Each clip is reduced four times (`clean`), and damaged as generated video is (`damaged`: soft, swimming, compressed,
its colors off). Bicubic and Lanczos enlargement, transport and `light` bring it back. Means over the frames 1..:

- PSNR in dB; unexplained: only where transport's confidence is below 0.5;
- HF: energy of luma less luma blurred by 2 pixels, over the truth's;
- warping error (Lai et al.) times 1e4, every fourth pair, with the flow of the truth's own frames, the same for every
  method, so that none is judged by the flow that its own trembling makes.

A rival is a program of your own: it reads the motion references that ``--motion FOLDER`` writes as
``CLIP-CONDITION.npy`` uint8 [F, h, w, 3], and writes ``RIVALS/NAME/CLIP-CONDITION.npy`` uint8 [F, H, W, 3].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from benchmarks.clips import REDUCTION, held_back_clips, truth_frames
from benchmarks.results import add_result_arguments, markdown_table, mean, number, say, settings_of, write_results
from swifti2v.evaluation.metrics import high_pass, psnr
from swifti2v.evaluation.motion import FramePair, warp_by
from swifti2v.geometry import Size
from swifti2v.light.refine import refine
from swifti2v.light.weights import load_network
from swifti2v.reference.resample import reduce_frames
from swifti2v.reference.transport import transport_with_confidence
from swifti2v.training.light.damage import CLEAN, HEAVY, damaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Array = np.ndarray[Any, Any]
CONDITIONS = {"clean": CLEAN, "damaged": HEAVY}
MEASURES = ("psnr", "psnr_unexplained", "hf", "warping_error_1e4")
PAIR_STEP = 4
SEED = 16


def motion_reference(truth: Array, condition: str) -> Array:
    """Reduce frames uint8 [F, H, W, 3] and damage them as the condition says."""
    small = reduce_frames(truth, REDUCTION)
    return small if condition == "clean" else damaged(small, CONDITIONS[condition], np.random.default_rng(SEED))


def methods(motion: Array, truth: Array, weights: Path | None) -> tuple[dict[str, Array], Array]:
    """Return what each method makes, uint8 [F, H, W, 3], and transport's confidence [F, H, W]."""
    height, width = truth.shape[1:3]
    image = torch.from_numpy(truth[0]).permute(2, 0, 1).float() / 127.5 - 1
    pieces = [torch.from_numpy(motion)]
    chunks = list(transport_with_confidence(pieces, image))
    network = load_network(torch.device("cpu"), weights)
    made = {
        name: np.stack([cv2.resize(frame, (width, height), interpolation=kernel) for frame in motion])
        for name, kernel in (("bicubic", cv2.INTER_CUBIC), ("Lanczos", cv2.INTER_LANCZOS4))
    }
    made["transport"] = _levels(chunk.frames for chunk in chunks)
    made["light"] = _levels(refine(pieces, image, network))
    return made, torch.cat([chunk.confidence for chunk in chunks], dim=2)[0, 0].numpy()


def judge(frames: Array, truth: Array, confidence: Array) -> dict[str, float]:
    """Return the measures of one method on one clip."""
    errors, energies, unexplained, count = [], [], 0.0, 0
    for frame, true, sure in zip(frames[1:], truth[1:], confidence[1:], strict=True):
        errors.append(psnr(frame, true))
        energies.append(float((high_pass(frame) ** 2).mean() / (high_pass(true) ** 2).mean()))
        difference = (frame[sure < 0.5].astype(np.float64) - true[sure < 0.5]) / 255
        unexplained, count = unexplained + float((difference**2).sum()), count + difference.size
    warping = []
    for index in range(PAIR_STEP, len(truth), PAIR_STEP):
        pair = FramePair(truth[index - 1], truth[index])
        moved = warp_by(frames[index - 1].astype(np.float32) / 255, pair.backward)
        squared = ((frames[index].astype(np.float32) / 255 - moved) ** 2).sum(axis=-1)
        warping.append(1e4 * float(squared[pair.visible].mean()))
    there = -10 * np.log10(max(unexplained, 1e-9) / count) if count else float("nan")
    return dict(zip(MEASURES, (mean(errors), float(there), mean(energies), mean(warping)), strict=True))


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], condition: str) -> str:
    """Return the means over the clips of one condition, a row for each method."""
    clips = [found for name, found in results.items() if name.endswith(f" {condition}")]
    names = list(dict.fromkeys(name for found in clips for name in found))
    rows = [
        [name, *(number(mean(found[name][measure] for found in clips if name in found)) for measure in MEASURES)]
        for name in names
    ]
    return markdown_table([condition, "PSNR", "unexplained", "HF", "warping error"], rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of INDEX.csv and its clips")
    parser.add_argument("--size", type=Size.of, default=Size(1280, 704))
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--max-clips", type=int)
    parser.add_argument("--weights", type=Path, help="folder of other weights than those that ship")
    parser.add_argument("--motion", type=Path, help="folder to write the motion references to, for rivals")
    parser.add_argument("--rivals", type=Path, help="folder with a folder of frames for each rival")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for item in held_back_clips(arguments.clips)[: arguments.max_clips]:
        truth = truth_frames(item.path, arguments.size, arguments.frames)
        for condition in CONDITIONS:
            motion = motion_reference(truth, condition)
            name = f"{item.path.stem}-{condition}"
            if arguments.motion is not None:
                arguments.motion.mkdir(parents=True, exist_ok=True)
                np.save(arguments.motion / f"{name}.npy", motion)
            made, confidence = methods(motion, truth, arguments.weights)
            made |= _rivals(arguments.rivals, name)
            results[f"{item.path.stem} {condition}"] = {
                method: judge(frames, truth, confidence) for method, frames in made.items()
            }
            say(f"{item.path.stem} {condition} done")
    print("\n\n".join(table(results, condition) for condition in CONDITIONS))
    say(str(write_results("light", {"settings": settings_of(arguments), "clips": results}, arguments.output)))


def _levels(chunks: Iterable[torch.Tensor]) -> Array:
    pixels = torch.cat([(chunk + 1).mul(127.5).round().clamp(0, 255).byte() for chunk in chunks], dim=2)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 3, 0).numpy())


def _rivals(folder: Path | None, name: str) -> dict[str, Array]:
    files = sorted(folder.glob(f"*/{name}.npy")) if folder is not None else []
    return {file.parent.name: np.load(file) for file in files}


if __name__ == "__main__":
    main()
