"""Training pairs for `light`: real clips and photographs that move, damaged in several ways, prepared once.

``python pairs.py --data DIR --output DIR --seed 0 --part 0 --parts 1``. Writes a folder per item with ``truth.npy``
uint8 [F, 3, H, W], and for the frames 1.. what `inputs.Prepared` has: ``base.npy`` uint8, ``detail.npy`` int8 (levels),
``evidence.npy`` int8 (1/254) and ``flow.npy`` float16.
"""

from __future__ import annotations

import argparse
import csv
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch

from swifti2v.data.procedural import CAMERA_MOTIONS, SCENE_MOTIONS, Motion, displacement, render
from swifti2v.geometry import Size
from swifti2v.light.inputs import Preparer
from swifti2v.media.video_reader import VideoReader
from swifti2v.training.light.damage import CLEAN, HEAVY, REDUCTIONS, Damage, damaged, reduce_frame, sample_damage

HELD_BACK_FROM = 1152
VALIDATION = ("davis_paragliding", "tos_balcony", "crystal_lotus", "person_table_a")
LEFT_OUT = ("asl_learn", "asl_please", "asl_again", "asl_no", "asl_hungry", "tos_operator_a")  # nearly equal to others
FRAMES = 17
LARGEST = (352, 640)


def clip_frames(path: Path, rng: np.random.Generator, *, stride: int, validation: bool) -> np.ndarray:
    frames = [frame.copy() for frame in VideoReader(path).frames()]
    stride = min(stride, max(1, (len(frames) - 1) // (FRAMES - 1)))
    span = (FRAMES - 1) * stride + 1
    start = 0 if validation else int(rng.integers(0, max(len(frames) - span, 0) + 1))
    chosen = frames[start : start + span : stride]
    height, width = chosen[0].shape[:2]
    h, w = min(LARGEST[0], height // 32 * 32), min(LARGEST[1], width // 32 * 32)
    top, left = (
        ((height - h) // 2, (width - w) // 2)
        if validation
        else (rng.integers(0, height - h + 1), rng.integers(0, width - w + 1))
    )
    return np.stack([frame[top : top + h, left : left + w] for frame in chosen])


def photo_frames(path: Path, other: Path, rng: np.random.Generator) -> np.ndarray:
    """Render a photograph that moves, with a patch of another photograph moving before it."""
    size = Size(576, 320)
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    speed = float(np.exp(rng.uniform(np.log(0.7), np.log(8))))
    motions = []
    if rng.random() < 0.75:
        motions.append(Motion(CAMERA_MOTIONS[int(rng.integers(len(CAMERA_MOTIONS)))], speed))
    if rng.random() < 0.5 or not motions:
        motions.append(Motion(SCENE_MOTIONS[int(rng.integers(len(SCENE_MOTIONS)))], speed))
    field = displacement(motions, size=size, num_frames=FRAMES)
    most = min(picture.shape[1], picture.shape[0] * size.width / size.height) * 0.95
    crop = float(rng.uniform(size.width, max(min(most, 2.5 * size.width), size.width + 1)))
    half_w, half_h = crop / 2, crop / 2 * size.height / size.width
    center = (
        float(rng.uniform(half_w, picture.shape[1] - half_w)),
        float(rng.uniform(half_h, picture.shape[0] - half_h)),
    )
    frames = render(picture, field, centre=center, crop_width=crop).astype(np.float32)
    if rng.random() < 0.6:
        cover = cv2.cvtColor(cv2.imread(str(other)), cv2.COLOR_BGR2RGB)
        scale = float(rng.uniform(0.35, 1.0))
        cover = cv2.resize(cover, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        radius = float(rng.uniform(40, 120))
        place = rng.uniform((100, 80), (476, 240))
        velocity, turn = rng.normal(0, 3.0, 2), float(rng.normal(0, 0.02))
        growth = float(rng.normal(0, 0.01))
        waves = rng.uniform(-0.25, 0.25, 4)
        origin = rng.uniform(
            (radius, radius), (max(cover.shape[1] - radius, radius + 1), max(cover.shape[0] - radius, radius + 1))
        )
        columns, rows = np.meshgrid(np.arange(size.width, dtype=np.float32), np.arange(size.height, dtype=np.float32))
        for index in range(FRAMES):
            angle, zoom = turn * index, np.exp(-growth * index)
            x, y = columns - place[0] - velocity[0] * index, rows - place[1] - velocity[1] * index
            x, y = zoom * (np.cos(angle) * x + np.sin(angle) * y), zoom * (np.cos(angle) * y - np.sin(angle) * x)
            theta = np.arctan2(y, x)
            edge = radius * (1 + sum(wave * np.sin((k + 1) * theta + k) for k, wave in enumerate(waves)))
            mask = np.clip(edge - np.hypot(x, y) + 0.5, 0, 1)[..., None]
            drawn = cv2.remap(
                cover,
                (x + origin[0]).astype(np.float32),
                (y + origin[1]).astype(np.float32),
                cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_REFLECT,
            )
            frames[index] = mask * drawn + (1 - mask) * frames[index]
    return np.rint(frames.clip(0, 255)).astype(np.uint8)


def prepared_item(
    truth: np.ndarray, damage: Damage, rng: np.random.Generator, *, reduction: str, scale: int
) -> tuple[dict, str]:
    height, width = truth.shape[1:3]
    small = np.stack([reduce_frame(frame, height // scale, width // scale, reduction=reduction) for frame in truth])
    small = damaged(small, damage, rng) if damage != CLEAN else small
    image = torch.from_numpy(truth[0]).permute(2, 0, 1).float() / 127.5 - 1
    preparer = Preparer(image)
    out = [preparer(job) for job in preparer.jobs(small)]
    stacked = {
        name: np.stack([getattr(part, name).numpy() for part in out]) for name in ("base", "detail", "evidence", "flow")
    }
    rounded = {"truth": truth.transpose(0, 3, 1, 2).copy()}
    rounded["base"] = np.rint((stacked["base"].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    rounded["detail"] = np.rint(stacked["detail"] * 127.5).clip(-127, 127).astype(np.int8)
    rounded["evidence"] = np.rint(stacked["evidence"] * 254).astype(np.int8)
    rounded["flow"] = stacked["flow"].astype(np.float16)
    transported = stacked["base"] + stacked["detail"] * 2 * stacked["evidence"][:, :1].repeat(4, 2).repeat(4, 3)
    goal = rounded["truth"][1:].astype(np.float32) / 127.5 - 1
    decibels = [float(10 * np.log10(4 / np.mean((made - goal) ** 2))) for made in (stacked["base"], transported)]
    amount = float(stacked["evidence"][:, -1].mean()) * 2
    return rounded, f"steadied {amount:.2f} base {decibels[0]:.2f} transport {decibels[1]:.2f}"


def items(data: Path) -> list[tuple[str, str, Path, int]]:
    rows = list(csv.DictReader((data / "INDEX.csv").open()))
    photos = [data / row["file"] for row in rows if row["kind"] == "photo" and row["licence_tier"] == "A"]
    found = []
    for row in rows:
        if row["kind"] != "clip" or row["licence_tier"] != "A" or int(row["width"]) >= HELD_BACK_FROM:
            continue
        name = Path(row["file"]).stem
        if name in VALIDATION:
            found += [("val", f"{name}_{variant}", data / row["file"], variant) for variant in range(2)]
        elif name not in LEFT_OUT:
            found += [("train", f"{name}_{variant}", data / row["file"], variant) for variant in range(4)]
    found += [("train", f"photo_{path.stem}_{variant}", path, variant) for path in photos for variant in range(4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    listed = sorted(items(arguments.data), key=lambda item: (item[0] != "val", item[3], item[1]))
    photos = [item[2] for item in listed if item[1].startswith("photo_")]
    for split, name, path, variant in listed[arguments.part :: arguments.parts]:
        target = arguments.output / f"{split}-{name}"
        if target.exists():
            continue
        rng = np.random.default_rng([arguments.seed, variant, zlib.crc32(name.encode())])
        begun = time.time()
        if name.startswith("photo_"):
            truth = photo_frames(path, photos[int(rng.integers(len(photos)))], rng)
        else:
            truth = clip_frames(path, rng, stride=1 + int(rng.random() < 0.35), validation=split == "val")
        if split == "val":
            damage, reduction, scale = (CLEAN, HEAVY)[variant], "bicubic", 4
        else:
            damage = CLEAN if variant == 0 else sample_damage(rng)
            reduction = REDUCTIONS[int(rng.integers(3))]
            scale = 4 if rng.random() < 0.8 else int(rng.choice([2, 3, 5]))
        if len(truth) < 9:
            continue
        item, said = prepared_item(truth, damage, rng, reduction=reduction, scale=scale)
        part = target.with_suffix(".part")
        part.mkdir(exist_ok=True)
        for key, values in item.items():
            np.save(part / f"{key}.npy", values)
        part.rename(target)
        print(
            f"{split} {name} {truth.shape} {damage} {reduction} x{scale} {said} {time.time() - begun:.1f} s", flush=True
        )


if __name__ == "__main__":
    main()
