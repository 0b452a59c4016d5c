"""Judges `light` on the held-back clips, clean and damaged, beside what it must beat.

Steps, each a command: ``prepare`` (truth, motion reference, transport of `swifti2v.reference`, `light`'s inputs; once),
``rivals`` (super-resolution networks on a subset of frames; slow), ``judge`` (with weights; writes JSON).

Measures, as in ``benchmarks/fidelity.py``: PSNR is the mean over the frames 1..; HF the energy of luma less luma blurred by
2 pixels over the truth's; unexplained are places where transport's confidence is below 0.5. HF there is the energy over
those places only. Warping error (times 1e4): Lai et al., with the flow of the truth's own frames, the same for every
variant, so that a variant is not judged by the flow that its own trembling makes; every `PAIR_STEP`-th pair.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from swifti2v.data.sources import read_index
from swifti2v.evaluation.metrics import high_pass, psnr
from swifti2v.evaluation.motion import FramePair, warp_by
from swifti2v.light.inputs import Preparer
from swifti2v.media.video_reader import VideoReader
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.transport import transport_with_confidence
from swifti2v.training.light.damage import CLEAN, HEAVY, damaged, reduce_frame

Array = np.ndarray[Any, Any]
SIZE = (704, 1280)
FRAMES = 33
CONDITIONS = {"clean": CLEAN, "damaged": HEAVY}
RIVAL_FRAMES = (12, 28)
PAIR_STEP = 4


def held_back(data: Path) -> list[Path]:
    return [item.path for item in read_index(data / "INDEX.csv") if item.kind == "clip" and item.width >= 1152]


def truth_of(path: Path, size: tuple[int, int] = SIZE, frames: int = FRAMES) -> Array:
    result = []
    for frame in VideoReader(path, max_frames=frames).frames():
        top, left = ((have - want) // 2 for have, want in zip(frame.shape[:2], size, strict=True))
        result.append(frame[top : top + size[0], left : left + size[1]].copy())
    return np.stack(result)


def prepare(path: Path, condition: str, target: Path) -> None:
    """Write all that does not depend on weights."""
    if target.exists() or target.with_suffix(".part").exists():
        return
    target.with_suffix(".part").mkdir(parents=True)
    truth = truth_of(path)
    image = torch.from_numpy(truth[0]).permute(2, 0, 1).float() / 127.5 - 1
    part = target.with_suffix(".part")
    former = target.with_suffix(".former")  # of other settings of `light`: what does not depend on them is kept
    if former.exists():
        for name in ("truth", "small", "transport", "confidence", "rival-srmdnf"):
            if (former / f"{name}.npy").exists():
                (former / f"{name}.npy").rename(part / f"{name}.npy")
        small = np.load(part / "small.npy")
    else:
        small = np.stack([reduce_frame(f, SIZE[0] // 4, SIZE[1] // 4, reduction="bicubic") for f in truth])
        if condition != "clean":
            small = damaged(small, CONDITIONS[condition], np.random.default_rng(16))
        begun = time.process_time()
        chunks = list(
            transport_with_confidence([torch.from_numpy(small)], image, options=ReferenceOptions(num_workers=1))
        )
        transport_seconds = (time.process_time() - begun) / len(truth)
        (part / "transport_seconds.json").write_text(json.dumps(transport_seconds))
        transported = torch.cat([c.frames for c in chunks], dim=2)[0]
        confidence = torch.cat([c.confidence for c in chunks], dim=2)[0, 0]
        np.save(part / "truth.npy", truth.transpose(0, 3, 1, 2))
        np.save(part / "small.npy", small)
        np.save(
            part / "transport.npy",
            np.rint((transported.numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0),
        )
        np.save(part / "confidence.npy", np.rint(confidence.numpy() * 255).astype(np.uint8))
    begun = time.process_time()
    preparer = Preparer(image)
    made = [preparer(job) for job in preparer.jobs(small)]
    prepare_seconds = (time.process_time() - begun) / len(truth)
    stacked = {
        name: np.stack([getattr(p, name).numpy() for p in made]) for name in ("base", "detail", "evidence", "flow")
    }
    np.save(part / "base.npy", np.rint((stacked["base"].clip(-1, 1) + 1) * 127.5).astype(np.uint8))
    np.save(part / "detail.npy", np.rint(stacked["detail"] * 127.5).clip(-127, 127).astype(np.int8))
    np.save(part / "evidence.npy", np.rint(stacked["evidence"] * 254).astype(np.int8))
    np.save(part / "flow.npy", stacked["flow"].astype(np.float16))
    (part / "seconds.json").write_text(json.dumps({"prepare": prepare_seconds}))
    part.rename(target)


class Measures:
    """Sums of a variant over the frames of a clip."""

    def __init__(self) -> None:
        self.decibels: dict[int, float] = {}
        self.energy: list[float] = []
        self.error_there = self.count_there = self.energy_there = self.true_there = 0.0
        self.warping: list[float] = []

    def add(self, index: int, frame: Array, truth: Array, true_pass: Array, unexplained: Array) -> None:
        self.decibels[index] = psnr(frame, truth)
        passed = high_pass(frame)
        self.energy.append(float((passed**2).mean() / (true_pass**2).mean()))
        difference = (frame[unexplained].astype(np.float64) - truth[unexplained]) / 255
        self.error_there += float((difference**2).sum()) / 3
        self.count_there += float(unexplained.sum())
        self.energy_there += float((passed[unexplained].astype(np.float64) ** 2).sum())
        self.true_there += float((true_pass[unexplained].astype(np.float64) ** 2).sum())

    def numbers(self) -> dict[str, Any]:
        there = self.count_there > 0
        return {
            "psnr": float(np.mean(list(self.decibels.values()))),
            "hf": float(np.mean(self.energy)),
            "psnr_unexplained": float(-10 * np.log10(max(self.error_there, 1e-9) / self.count_there))
            if there
            else None,
            "hf_unexplained": self.energy_there / max(self.true_there, 1e-9) if there else None,
            "warping_error_1e4": 1e4 * float(np.mean(self.warping)) if self.warping else None,
            "psnr_by_frame": {str(k): round(v, 3) for k, v in self.decibels.items()},
        }


def light_frames(item: Path, network: Any, *, autocast: bool = True):
    """Yield the frames 1.. that the network makes of prepared inputs, uint8 [H, W, 3]."""
    arrays = {
        name: np.load(item / f"{name}.npy", mmap_mode="r") for name in ("truth", "base", "detail", "evidence", "flow")
    }
    state = network.initial_state(torch.from_numpy(arrays["truth"][:1].astype(np.float32) / 127.5 - 1))
    for index in range(len(arrays["flow"])):
        parts = (
            arrays["base"][index : index + 1].astype(np.float32) / 127.5 - 1,
            arrays["detail"][index : index + 1].astype(np.float32) / 127.5,
            arrays["evidence"][index : index + 1].astype(np.float32) / 254,
            arrays["flow"][index : index + 1].astype(np.float32),
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = network.step(*(torch.from_numpy(part) for part in parts), state)
        frame = state.frame[0].float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        yield frame.permute(1, 2, 0).contiguous().numpy()


def judge(
    item: Path, variants: dict[str, Any], *, frames: tuple[int, ...] | None = None, warping: bool = True
) -> dict[str, Any]:
    """Measure variants, each an iterator over the frames 1.. (or over `frames` only)."""
    truth = np.load(item / "truth.npy", mmap_mode="r")
    confidence = np.load(item / "confidence.npy", mmap_mode="r")
    indices = frames or range(1, len(truth))
    measures = {name: Measures() for name in variants}
    earlier: dict[str, Array] = {}
    for index in indices:
        true = np.ascontiguousarray(truth[index].transpose(1, 2, 0))
        passed, unexplained = high_pass(true), confidence[index] < 128
        pair = None
        if warping and frames is None and index % PAIR_STEP == 0:
            pair = FramePair(np.ascontiguousarray(truth[index - 1].transpose(1, 2, 0)), true)
            seen, backward = pair.visible, pair.backward
        for name, source in variants.items():
            frame = next(source)
            measures[name].add(index, frame, true, passed, unexplained)
            if pair is not None and name in earlier:
                moved = warp_by(earlier[name].astype(np.float32) / 255, backward)
                squared = ((frame.astype(np.float32) / 255 - moved) ** 2).sum(axis=-1)
                measures[name].warping.append(float(squared[seen].mean()))
            if warping and index % PAIR_STEP == PAIR_STEP - 1:
                earlier[name] = frame
    result = {name: m.numbers() for name, m in measures.items()}
    result["unexplained_share"] = float((confidence[1:] < 128).mean())
    return result


def simple_variants(item: Path) -> dict[str, Any]:
    small, transported = np.load(item / "small.npy"), np.load(item / "transport.npy", mmap_mode="r")
    truth = np.load(item / "truth.npy", mmap_mode="r")
    size = SIZE[::-1]
    return {
        "bicubic": (cv2.resize(f, size, interpolation=cv2.INTER_CUBIC) for f in small[1:]),
        "lanczos": (cv2.resize(f, size, interpolation=cv2.INTER_LANCZOS4) for f in small[1:]),
        "transport": (np.asarray(f) for f in transported[1:]),
        "truth": (np.ascontiguousarray(f.transpose(1, 2, 0)) for f in truth[1:]),
    }


def rival_variants(item: Path, names: list[str], frames: tuple[int, ...]) -> dict[str, Any]:
    """Rivals on the frames that were made, alone and under transport."""
    result = {}
    small, transported = np.load(item / "small.npy"), np.load(item / "transport.npy", mmap_mode="r")
    confidence = np.load(item / "confidence.npy", mmap_mode="r")
    for name in names:
        file = item / f"rival-{name}.npy"
        if not file.exists():
            continue
        made = np.load(file)
        under = []
        for frame, index in zip(made, frames, strict=False):
            bicubic = cv2.resize(small[index], SIZE[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
            doubt = 1 - confidence[index].astype(np.float32)[..., None] / 255
            under.append(np.rint((transported[index] + doubt * (frame - bicubic)).clip(0, 255)).astype(np.uint8))
        result[name], result[f"{name} under transport"] = iter(made), iter(under)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "simple", "rivals", "judge-rivals", "judge"))
    parser.add_argument("--data", type=Path, default=Path("/work/shared/data"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rivals", nargs="*", default=["srmdnf", "animevideo"])
    parser.add_argument("--rival-command", nargs=2, help="interpreter and script that run a rival")
    parser.add_argument("--clips", nargs="*")
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS))
    parser.add_argument("--frames", type=int, nargs="*", default=list(RIVAL_FRAMES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    results: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    frames = tuple(arguments.frames)
    network = None
    if arguments.weights:
        from swifti2v.light.weights import load_network

        network = load_network(arguments.weights).to(memory_format=torch.channels_last)
    for path in held_back(arguments.data):
        if arguments.clips and path.stem not in arguments.clips:
            continue
        for condition in arguments.conditions:
            item = arguments.work / f"test-{path.stem}-{condition}"
            key = f"{path.stem} {condition}"
            begun = time.time()
            if arguments.step != "prepare" and not item.exists():
                continue
            if arguments.step == "prepare":
                prepare(path, condition, item)
            elif arguments.step == "rivals":
                np.save(item / "rival-input.npy", np.load(item / "small.npy")[list(frames)])
                for name in arguments.rivals:
                    if not (item / f"rival-{name}.npy").exists():
                        subprocess.run(
                            [
                                *arguments.rival_command,
                                name,
                                str(item / "rival-input.npy"),
                                str(item / f"rival-{name}.npy"),
                            ],
                            check=True,
                        )
            elif key in results:
                continue
            elif arguments.step == "simple":
                results[key] = judge(item, simple_variants(item))
            elif arguments.step == "judge-rivals":
                results[key] = judge(item, rival_variants(item, arguments.rivals, frames), frames=frames)
            else:
                results[key] = judge(item, {"light": light_frames(item, network)})
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1))
            print(
                key,
                f"{time.time() - begun:.0f} s",
                {
                    k: (
                        round(v["psnr"], 2),
                        round(v["hf"], 2),
                        v["psnr_unexplained"] and round(v["psnr_unexplained"], 2),
                        v["hf_unexplained"] and round(v["hf_unexplained"], 2),
                        v["warping_error_1e4"] and round(v["warping_error_1e4"], 2),
                    )
                    for k, v in results.get(key, {}).items()
                    if isinstance(v, dict)
                },
                flush=True,
            )


if __name__ == "__main__":
    main()
