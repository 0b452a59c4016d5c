"""Pairs of truth and hybrid reference in latents: what Stage II learns from.

The motion reference of a training clip is its truth reduced by `REDUCTION`; a part of them passes through the codec of
Stage I, so that Stage II meets the artifacts which it will find there (stage-transition, paper). Noise is not added:
Stage I of `mini` makes none, and Stage II learned to take fast motion for it (`docs/log.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from swifti2v.geometry import Size
from swifti2v.mini.train_stage_one import procedural_clip
from swifti2v.pixels import from_uint8, to_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.resample import reduce_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from swifti2v.data.sources import MediaItem
    from swifti2v.mini.motion_codec import MotionCodec
    from swifti2v.mini.transform_codec import BlockTransformCodec
    from swifti2v.settings import ReferenceMode

REDUCTION = 4
PIECES = ((0, 1), (40, 1), (0, 2))
"""First frame and stride of the pieces of a clip; at stride 2 everything moves twice as fast."""


@dataclass(frozen=True)
class ReferencePair:
    """Latents [C,T,h,w] float16 of a clip and of its hybrid reference."""

    truth: Tensor
    reference: Tensor


def read_clip(
    path: Path,
    *,
    num_frames: int,
    first_frame: int = 0,
    stride: int = 1,
    multiple: int = 32,
    max_width: int | None = None,
) -> NDArray[np.uint8]:
    """Read [F,H,W,3] uint8 frames, every `stride`-th, centre-cropped to sides that are multiples of `multiple`.

    Wider ones than `max_width` are reduced to it first.
    """
    capture = cv2.VideoCapture(str(path))
    frames = []
    try:
        for index in range(first_frame + (num_frames - 1) * stride + 1):
            found, frame = capture.read()
            if not found:
                break
            if index >= first_frame and (index - first_frame) % stride == 0:
                frames.append(_at_most(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), max_width))
    finally:
        capture.release()
    if not frames:
        return np.empty((0, 0, 0, 3), dtype=np.uint8)
    height, width = (side // multiple * multiple for side in frames[0].shape[:2])
    top, left = (frames[0].shape[0] - height) // 2, (frames[0].shape[1] - width) // 2
    return np.stack(frames)[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are made, and how their references differ from those of the best Stage I.

    Args:
        num_frames: of a clip, 4k+1.
        procedural_per_photograph: clips rendered over each photograph.
        procedural_width, procedural_height: of their frames.
        clip_width: wider clips are reduced to it; None: as they are.
        coded_share: share of motion references that have passed through Stage I's codec.
        replaced_share: share of references without transport (`replace`): what transport cannot explain looks so.
    """

    num_frames: int = 33
    procedural_per_photograph: int = 4
    procedural_width: int = 640
    procedural_height: int = 352
    clip_width: int | None = None
    coded_share: float = 0.3
    replaced_share: float = 0.3


def make_pair(
    frames: NDArray[np.uint8],
    *,
    codec: BlockTransformCodec,
    motion_codec: MotionCodec,
    options: PairOptions,
    rng: np.random.Generator,
) -> ReferencePair:
    """Encode a clip uint8 [F,H,W,3] and its hybrid reference, F = 4k+1."""
    motion = reduce_frames(frames, REDUCTION)
    if rng.random() < options.coded_share:
        motion = through_codec(motion, motion_codec)
    mode: ReferenceMode = "replace" if rng.random() < options.replaced_share else "transport"
    truth = from_uint8(frames)
    transport = ReferenceOptions(mode=mode, num_workers=1)
    chunks = hybrid_reference([torch.from_numpy(motion)], truth[0, :, 0], options=transport)
    return ReferencePair(
        truth=_latents(codec, _chunked(truth)),
        reference=_latents(codec, chunks),
    )


def clip_pairs(
    items: Sequence[MediaItem],
    photographs: Sequence[NDArray[np.uint8]],
    *,
    codec: BlockTransformCodec,
    motion_codec: MotionCodec,
    options: PairOptions,
    seed: int,
) -> Iterator[ReferencePair]:
    """Yield pairs of real clips (two pieces of each, where it is long enough) and of procedural ones."""
    rng = np.random.default_rng(seed)
    size = Size(options.procedural_width, options.procedural_height)
    for item in items:
        for start, stride in PIECES:
            frames = read_clip(
                item.path,
                num_frames=options.num_frames,
                first_frame=start,
                stride=stride,
                max_width=options.clip_width,
            )
            if len(frames) == options.num_frames:
                yield make_pair(frames, codec=codec, motion_codec=motion_codec, options=options, rng=rng)
    for photograph in photographs:
        for _ in range(options.procedural_per_photograph):
            clip = procedural_clip(photograph, "", size=size, num_frames=options.num_frames, rng=rng)
            yield make_pair(
                to_uint8(clip.frames[None]).numpy(), codec=codec, motion_codec=motion_codec, options=options, rng=rng
            )


def _at_most(frame: NDArray[np.uint8], width: int | None) -> NDArray[np.uint8]:
    if width is None or frame.shape[1] <= width:
        return frame
    height = round(frame.shape[0] * width / frame.shape[1])
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def through_codec(frames: NDArray[np.uint8], codec: MotionCodec) -> NDArray[np.uint8]:
    """Return frames uint8 [F,h,w,3] encoded and decoded; what exceeds a multiple of 8 pixels stays as it is."""
    height, width = (side // 8 * 8 for side in frames.shape[1:3])
    decoded = codec.decode(codec.encode(from_uint8(frames[:, :height, :width])).latents).sample
    result = frames.copy()
    result[:, :height, :width] = to_uint8(decoded).numpy()
    return result


def _chunked(frames_BCFHW: Tensor) -> Iterator[Tensor]:
    yield frames_BCFHW[:, :, :1]
    yield from torch.split(frames_BCFHW[:, :, 1:], 4, dim=2)


def _latents(codec: BlockTransformCodec, chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(codec.encode_stream(chunks)), dim=2)[0].half()
