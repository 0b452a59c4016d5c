"""Training pairs for `light`: real clips and photographs that move, damaged in several ways, prepared once.

Each item is a folder with ``truth.npy`` uint8 [F, 3, H, W], and for the frames 1.. what `light.inputs.Prepared` has:
``base.npy`` uint8, ``detail.npy`` int8 (levels of 1/127.5), ``evidence.npy`` int8 (1/254) and ``flow.npy`` float16.
Clips are read frame by frame as stored, not at the rate of training, and are cut, never resampled: their finest detail
is what `light` is to learn.
"""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np
import torch

from swifti2v.data.procedural import CAMERA_MOTIONS, SCENE_MOTIONS, Motion, displacement, render
from swifti2v.data.sources import read_index
from swifti2v.errors import ConfigurationError
from swifti2v.geometry import Size
from swifti2v.light.inputs import Preparer
from swifti2v.media.atomic_files import make_folder
from swifti2v.media.images import load_image
from swifti2v.media.video_reader import VideoReader
from swifti2v.training.light.damage import CLEAN, HEAVY, REDUCTIONS, Damage, Reduction, damaged, reduced, sample_damage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from swifti2v.data.sources import MediaItem

Array = np.ndarray[Any, Any]
Split = Literal["train", "val"]

FRAMES = 17
FEWEST_FRAMES = 9
"""Clips that are shorter are left out."""
LARGEST = Size(640, 352)
"""Clips are cut to this at most."""
PHOTOGRAPH_SIZE = Size(576, 320)


@dataclass(frozen=True)
class PairOptions:
    """Which items are made of an index.

    Args:
        tiers: grades of license that the index gives; weights are shipped, so only those that allow it.
        max_clip_width: wider clips are held back for evaluation.
        validation: names of clips (without suffix) that are validated with, clean and damaged.
        left_out: names of clips that are nearly equal to others.
        variants: items of each source: the first undamaged, the others with damage that is drawn.
        seed: of all that is drawn.
    """

    tiers: tuple[str, ...] = ("A",)
    max_clip_width: int = 1151
    validation: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    variants: int = 4
    seed: int = 0


class PlannedItem(NamedTuple):
    """An item to make; `name` ends with the variant, and ``_0`` is undamaged."""

    split: Split
    name: str
    source: MediaItem
    variant: int

    @property
    def folder_name(self) -> str:
        """Name of its folder."""
        return f"{self.split}-{self.name}"


def prepare_pairs(
    index: Path, folder: Path, options: PairOptions, *, on_item: Callable[[int, int], None] | None = None
) -> None:
    """Make the items that are not in `folder` yet; each appears as a whole.

    Args:
        index: of clips and photographs (`data.sources.read_index`).
        folder: of the items.
        options: which, and their seed.
        on_item: told how many of how many are done.

    Raises:
        ConfigurationError: the index cannot be read, or has nothing to train on.
        VideoInputError: a clip is damaged.
        OutputError: the folder cannot be made.
    """
    make_folder(folder)
    planned = plan_items(read_index(index), options)
    photographs = [item.source.path for item in planned if item.source.kind == "photo"]
    for done, item in enumerate(planned, start=1):
        if not (folder / item.folder_name).exists():
            _make_item(item, photographs, folder, options)
        if on_item is not None:
            on_item(done, len(planned))


def plan_items(sources: Sequence[MediaItem], options: PairOptions) -> list[PlannedItem]:
    """Return the items in the order in which they are made: validation first, then variant by variant."""
    planned: list[PlannedItem] = []
    for source in sources:
        stem = source.path.stem
        if source.tier not in options.tiers:
            continue
        if source.kind == "photo":
            names: tuple[Split, str, int] = ("train", f"photo_{stem}", options.variants)
        elif source.width > options.max_clip_width or stem in options.left_out:
            continue
        else:
            names = ("val", stem, 2) if stem in options.validation else ("train", stem, options.variants)
        split, name, variants = names
        planned += [PlannedItem(split, f"{name}_{variant}", source, variant) for variant in range(variants)]
    if not any(item.split == "train" for item in planned):
        msg = f"the index has nothing of the tiers {options.tiers} to train on; choose other tiers or another index"
        raise ConfigurationError(msg)
    return sorted(planned, key=lambda item: (item.split != "val", item.variant, item.name))


def _make_item(item: PlannedItem, photographs: Sequence[Path], folder: Path, options: PairOptions) -> None:
    rng = np.random.default_rng([options.seed, item.variant, zlib.crc32(item.name.encode())])
    if item.source.kind == "photo":
        truth = photo_frames(item.source.path, photographs[int(rng.integers(len(photographs)))], rng)
    else:
        stride = 1 + int(rng.random() < 0.35)
        truth = clip_frames(item.source.path, rng, stride=stride, centered=item.split == "val")
    damage, scale = (CLEAN, HEAVY)[item.variant > 0], 4
    reduction: Reduction = "bicubic"
    if item.split == "train":
        damage = CLEAN if item.variant == 0 else sample_damage(rng)
        reduction = REDUCTIONS[int(rng.integers(3))]
        scale = 4 if rng.random() < 0.8 else int(rng.choice([2, 3, 5]))
    if len(truth) < FEWEST_FRAMES:
        return
    arrays = prepared_item(truth, damage, rng, reduction=reduction, scale=scale)
    partial = folder / f".{item.folder_name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, values in arrays.items():
        np.save(partial / f"{name}.npy", values)
    partial.rename(folder / item.folder_name)


def clip_frames(path: Path, rng: np.random.Generator, *, stride: int, centered: bool) -> Array:
    """Return up to `FRAMES` frames of a clip, every `stride`-th, cut to at most `LARGEST`: uint8 [F, H, W, 3].

    Args:
        path: of the video.
        rng: draws the first frame and the place.
        stride: less where the clip is too short for it.
        centered: take the first frame and the middle.
    """
    frames = [frame.copy() for frame in VideoReader(path).frames()]
    stride = min(stride, max(1, (len(frames) - 1) // (FRAMES - 1)))
    span = (FRAMES - 1) * stride + 1
    start = 0 if centered else int(rng.integers(0, max(len(frames) - span, 0) + 1))
    chosen = frames[start : start + span : stride]
    height, width = chosen[0].shape[:2]
    cut = Size(min(LARGEST.width, width // 32 * 32), min(LARGEST.height, height // 32 * 32))
    if centered:
        top, left = (height - cut.height) // 2, (width - cut.width) // 2
    else:
        top, left = int(rng.integers(0, height - cut.height + 1)), int(rng.integers(0, width - cut.width + 1))
    return np.stack([frame[top : top + cut.height, left : left + cut.width] for frame in chosen])


def photo_frames(path: Path, other: Path, rng: np.random.Generator) -> Array:
    """Render a photograph that moves, in three of five cases with a patch of another photograph moving before it.

    Returns:
        uint8 [FRAMES, H, W, 3] of `PHOTOGRAPH_SIZE`.
    """
    size = PHOTOGRAPH_SIZE
    picture = np.asarray(load_image(path).image)
    speed = float(np.exp(rng.uniform(np.log(0.7), np.log(8))))
    motions = []
    if rng.random() < 0.75:
        motions.append(Motion(CAMERA_MOTIONS[int(rng.integers(len(CAMERA_MOTIONS)))], speed))
    if rng.random() < 0.5 or not motions:
        motions.append(Motion(SCENE_MOTIONS[int(rng.integers(len(SCENE_MOTIONS)))], speed))
    field = displacement(motions, size=size, num_frames=FRAMES)
    most = min(picture.shape[1], picture.shape[0] * size.width / size.height) * 0.95
    crop = float(rng.uniform(size.width, max(min(most, 2.5 * size.width), size.width + 1)))
    half_width, half_height = crop / 2, crop / 2 * size.height / size.width
    center = (
        float(rng.uniform(half_width, picture.shape[1] - half_width)),
        float(rng.uniform(half_height, picture.shape[0] - half_height)),
    )
    frames = render(picture, field, center=center, crop_width=crop).astype(np.float32)
    if rng.random() < 0.6:
        _cover(frames, np.asarray(load_image(other).image), rng)
    return np.rint(frames.clip(0, 255)).astype(np.uint8)


def _cover(frames: Array, cover: Array, rng: np.random.Generator) -> None:
    """Let a patch of `cover` with a wavy edge move, turn and grow before the frames float32 [F, H, W, 3], in place."""
    scale = float(rng.uniform(0.35, 1.0))
    cover = np.asarray(cv2.resize(cover, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    radius = float(rng.uniform(40, 120))
    place = rng.uniform((100, 80), (476, 240))
    velocity, turn = rng.normal(0, 3.0, 2), float(rng.normal(0, 0.02))
    growth = float(rng.normal(0, 0.01))
    waves = rng.uniform(-0.25, 0.25, 4)
    farthest = (max(cover.shape[1] - radius, radius + 1), max(cover.shape[0] - radius, radius + 1))
    origin = rng.uniform((radius, radius), farthest)
    height, width = frames.shape[1:3]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    for index in range(len(frames)):
        angle, zoom = turn * index, np.exp(-growth * index)
        x, y = columns - place[0] - velocity[0] * index, rows - place[1] - velocity[1] * index
        x, y = zoom * (np.cos(angle) * x + np.sin(angle) * y), zoom * (np.cos(angle) * y - np.sin(angle) * x)
        theta = np.arctan2(y, x)
        edge = radius * (1 + sum(wave * np.sin((k + 1) * theta + k) for k, wave in enumerate(waves)))
        mask = np.clip(edge - np.hypot(x, y) + 0.5, 0, 1)[..., None]
        x, y = (x + origin[0]).astype(np.float32), (y + origin[1]).astype(np.float32)
        drawn = cv2.remap(cover, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        frames[index] = mask * drawn + (1 - mask) * frames[index]


def prepared_item(
    truth: Array, damage: Damage, rng: np.random.Generator, *, reduction: Reduction, scale: int
) -> dict[str, Array]:
    """Reduce and damage a clip uint8 [F, H, W, 3], and return the arrays of its item by name (see the module)."""
    height, width = truth.shape[1:3]
    small = np.stack([reduced(frame, height // scale, width // scale, reduction=reduction) for frame in truth])
    small = damaged(small, damage, rng) if damage != CLEAN else small
    preparer = Preparer(torch.from_numpy(truth[0]).permute(2, 0, 1).float() / 127.5 - 1)
    prepared = [preparer(job) for job in preparer.jobs(small)]
    base, detail, evidence, flow = (np.stack([part.numpy() for part in parts]) for parts in zip(*prepared, strict=True))
    return {
        "truth": truth.transpose(0, 3, 1, 2).copy(),
        "base": np.rint((base.clip(-1, 1) + 1) * 127.5).astype(np.uint8),
        "detail": np.rint(detail * 127.5).clip(-127, 127).astype(np.int8),
        "evidence": np.rint(evidence * 254).astype(np.int8),
        "flow": flow.astype(np.float16),
    }
