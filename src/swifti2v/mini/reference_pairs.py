"""Pairs of truth and hybrid reference in latents: what Stage II learns from.

The motion reference of a training clip is its truth reduced by `REDUCTION`: Stage I of `mini` moves the image itself,
and its frames are as clean. Noise is not added: Stage II learned to take fast motion for it (`docs/log.md`). A share of
them may be damaged by JPEG, for studies of references with artifacts (stage-transition, paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from swifti2v.data.procedural import displacement, find_horizon, render, sample_motions
from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.resample import reduce_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from swifti2v.data.sources import MediaItem
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
    """Read [F,H,W,3] uint8 frames, every `stride`-th, center-cropped to sides that are multiples of `multiple`.

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
        damaged_share: share of motion references that are `damaged`.
        replaced_share: share of references without transport (`replace`): what transport cannot explain looks so.
    """

    num_frames: int = 33
    procedural_per_photograph: int = 4
    procedural_width: int = 640
    procedural_height: int = 352
    clip_width: int | None = None
    damaged_share: float = 0.0
    replaced_share: float = 0.3


def make_pair(
    frames: NDArray[np.uint8],
    *,
    codec: BlockTransformCodec,
    options: PairOptions,
    rng: np.random.Generator,
) -> ReferencePair:
    """Encode a clip uint8 [F,H,W,3] and its hybrid reference, F = 4k+1."""
    motion = reduce_frames(frames, REDUCTION)
    if rng.random() < options.damaged_share:
        motion = damaged(motion)
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
                yield make_pair(frames, codec=codec, options=options, rng=rng)
    for photograph in photographs:
        for _ in range(options.procedural_per_photograph):
            frames = procedural_clip(photograph, size=size, num_frames=options.num_frames, rng=rng)
            yield make_pair(frames, codec=codec, options=options, rng=rng)


def _at_most(frame: NDArray[np.uint8], width: int | None) -> NDArray[np.uint8]:
    if width is None or frame.shape[1] <= width:
        return frame
    height = round(frame.shape[0] * width / frame.shape[1])
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def procedural_clip(
    photograph: NDArray[np.uint8], *, size: Size, num_frames: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw a crop and motions, and render the clip, uint8 [F,H,W,3]."""
    if rng.random() < 0.5:
        photograph = photograph[:, ::-1]
    height, width = photograph.shape[:2]
    widest = min(width, height * size.width / size.height) * 0.85
    crop_width = float(rng.uniform(min(max(size.width, 0.4 * widest), widest), widest))
    crop_width = max(crop_width, size.width)
    crop_height = crop_width * size.height / size.width
    center = (
        float(rng.uniform(crop_width / 2, max(crop_width / 2, width - crop_width / 2))),
        float(rng.uniform(crop_height / 2, max(crop_height / 2, height - crop_height / 2))),
    )
    still = render(
        photograph, np.zeros((1, size.height, size.width, 2), np.float32), center=center, crop_width=crop_width
    )
    motions = sample_motions(rng)
    moved = displacement(motions, size=size, num_frames=num_frames, horizon=find_horizon(still[0]))
    return render(photograph, moved, center=center, crop_width=crop_width)


def damaged(frames: NDArray[np.uint8], *, quality: int = 15) -> NDArray[np.uint8]:
    """Return frames uint8 [F,h,w,3] after JPEG of a low `quality`."""
    coded = (cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in frames)
    return np.stack([np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8) for data in coded])


def _chunked(frames_BCFHW: Tensor) -> Iterator[Tensor]:
    yield frames_BCFHW[:, :, :1]
    yield from torch.split(frames_BCFHW[:, :, 1:], 4, dim=2)


def _latents(codec: BlockTransformCodec, chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(codec.encode_stream(chunks)), dim=2)[0].half()
