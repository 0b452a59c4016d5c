"""Pairs of truth and hybrid reference in latents: what Stage II learns from.

The motion reference of a training clip is its truth reduced by `REDUCTION` and then *damaged* as Stage I damages it
(stage-transition, paper): passed through Stage I's codec, softened, with texture noise, with a drift of brightness. A
part stays clean. Stage II then meets the artefacts it will have to undo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.training.stage_one import procedural_clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from swifti2v.data.sources import MediaItem
    from swifti2v.geometry import Size
    from swifti2v.models.motion_codec import MotionCodec
    from swifti2v.models.transform_codec import BlockTransformCodec

REDUCTION = 4


@dataclass(frozen=True)
class ReferencePair:
    """Latents [C,T,h,w] float16 of a clip and of its hybrid reference."""

    truth: Tensor
    reference: Tensor


def read_clip(path: Path, *, num_frames: int, first_frame: int = 0, multiple: int = 32) -> NDArray[np.uint8]:
    """Read [F,H,W,3] uint8 frames, centre-cropped to sides that are multiples of `multiple`."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    try:
        for index in range(first_frame + num_frames):
            found, frame = capture.read()
            if not found:
                break
            if index >= first_frame:
                frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if not frames:
        return np.empty((0, 0, 0, 3), dtype=np.uint8)
    height, width = (side // multiple * multiple for side in frames[0].shape[:2])
    top, left = (frames[0].shape[0] - height) // 2, (frames[0].shape[1] - width) // 2
    return np.stack(frames)[:, top : top + height, left : left + width]


def reduced(frames: NDArray[np.uint8], factor: int = REDUCTION) -> NDArray[np.uint8]:
    """Reduce frames by `factor`, antialiased: the motion reference that a perfect Stage I would make."""
    size = (frames.shape[2] // factor, frames.shape[1] // factor)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def damaged(motion: NDArray[np.uint8], rng: np.random.Generator, codec: MotionCodec | None) -> NDArray[np.uint8]:
    """Damage a motion reference as Stage I might; four in ten stay as they are."""
    if rng.random() < 0.4:
        return motion
    frames = motion
    if codec is not None and rng.random() < 0.6:
        frames = _through_codec(frames, codec)
    pixels = frames.astype(np.float32) / 255
    if rng.random() < 0.4:
        sigma = float(rng.uniform(0.3, 0.8))
        pixels = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in pixels])
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(0.005, 0.025), pixels.shape).astype(np.float32)
    if rng.random() < 0.4:
        drift = np.linspace(0, rng.uniform(-0.04, 0.04), len(pixels), dtype=np.float32)
        pixels = pixels * (1 + drift[:, None, None, None])
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def make_pair(
    frames: NDArray[np.uint8],
    *,
    codec: BlockTransformCodec,
    motion_codec: MotionCodec | None,
    rng: np.random.Generator,
) -> ReferencePair:
    """Encode a clip [F,H,W,3] and its hybrid reference (mostly transported, sometimes replaced), F = 4k+1."""
    motion = damaged(reduced(frames), rng, motion_codec)
    options = ReferenceOptions(mode="transport" if rng.random() < 0.85 else "replace", num_workers=1)
    truth = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    chunks = hybrid_reference([torch.from_numpy(motion)], truth[:, 0], options=options)
    return ReferencePair(
        truth=_latents(codec, _chunked(truth)),
        reference=_latents(codec, chunks),
    )


def clip_pairs(
    items: Sequence[MediaItem],
    photographs: Sequence[NDArray[np.uint8]],
    *,
    codec: BlockTransformCodec,
    motion_codec: MotionCodec | None,
    num_frames: int,
    size: Size,
    procedural_per_photograph: int,
    seed: int,
) -> Iterator[ReferencePair]:
    """Yield pairs of real clips (every `num_frames` frames of each) and of procedural ones over photographs."""
    rng = np.random.default_rng(seed)
    for item in items:
        for start in (0, 40):
            frames = read_clip(item.path, num_frames=num_frames, first_frame=start)
            if len(frames) == num_frames:
                yield make_pair(frames, codec=codec, motion_codec=motion_codec, rng=rng)
    for photograph in photographs:
        for _ in range(procedural_per_photograph):
            clip = procedural_clip(photograph, "", size=size, num_frames=num_frames, rng=rng)
            frames = ((clip.frames.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            yield make_pair(frames, codec=codec, motion_codec=motion_codec, rng=rng)


def _through_codec(frames: NDArray[np.uint8], codec: MotionCodec) -> NDArray[np.uint8]:
    height, width = (side // 8 * 8 for side in frames.shape[1:3])
    pixels = torch.from_numpy(frames[:, :height, :width]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    decoded = codec.decode(codec.encode(pixels).latents).sample[0]
    result = frames.copy()
    result[:, :height, :width] = ((decoded.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    return result


def _chunked(frames_CFHW: Tensor) -> Iterator[Tensor]:
    yield frames_CFHW[None, :, :1]
    yield from torch.split(frames_CFHW[None, :, 1:], 4, dim=2)


def _latents(codec: BlockTransformCodec, chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(codec.encode_stream(chunks)), dim=2)[0].half()
