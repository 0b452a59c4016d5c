"""The image's detail carried along the motion: what the motion reference cannot hold, but says where it went.

Beyond the paper (docs/design.md 4). The residual ``image - upsample(motion frame 0)`` is warped to every frame and
added where the flow explains the frame. It is taken against the motion reference's own frame 0, so that whatever
softens all its frames alike is undone with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch

from swifti2v.reference.flow import CorrespondenceEstimator
from swifti2v.reference.frames import check_image, in_chunks, single_frames, split_first
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.replace import to_unit
from swifti2v.reference.resample import enlarge, upsample, warp
from swifti2v.reference.workers import ahead, on_this_stream, worker_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


class TransportedChunk(NamedTuple):
    """Pixel frames of one latent frame, and how far each place was explained by frame 0.

    Args:
        frames: [1, 3, f, H, W] float32 in [-1, 1].
        confidence: [1, 1, f, H, W] float32 in [0, 1]; 1 in frame 0.
    """

    frames: Tensor
    confidence: Tensor


class DetailTransport:
    """Makes output frames out of frames of the motion reference.

    Calls are independent of each other and may run in parallel.

    Args:
        first: frame 0 of the motion reference, uint8 [h, w, 3].
        image: [3, H, W] float32 in [-1, 1] on the device where the work is to be done.
        options: see `ReferenceOptions`.
    """

    def __init__(self, first: Tensor, image: Tensor, *, options: ReferenceOptions) -> None:
        self.options = options
        self.height, self.width = image.shape[-2:]
        self.device = image.device
        self.estimate = CorrespondenceEstimator(first.cpu().numpy(), self.height, self.width, options=options)
        self.detail = image - self._kept(to_unit(first))

    def __call__(self, frame: Tensor) -> Tensor:
        """Return [4, H, W] float32: the frame in [-1, 1] and its confidence in [0, 1], of `frame` uint8 [h, w, 3]."""
        correspondence = self.estimate(frame.cpu().numpy())
        flow = enlarge(correspondence.flow, self.height, self.width, device=self.device)
        flow *= flow.new_tensor((self.width, self.height))[:, None, None]
        correction = warp(self.detail, flow)
        del flow
        confidence = enlarge(correspondence.confidence, self.height, self.width, device=self.device)
        unit = to_unit(frame)
        base = upsample(unit, self.height, self.width, device=self.device)
        # In place: at 2560x1408 every temporary of a frame is 43 MB, and each worker has its own.
        if self.options.band_sigma > 0:
            correction.add_(self._kept(unit)).sub_(base)
        result = torch.empty((4, self.height, self.width), device=self.device)
        torch.mul(correction, confidence, out=result[:3]).add_(base).clamp_(-1, 1)
        result[3:] = confidence
        return result

    def _kept(self, unit: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
        """Return the part of a frame that stays the motion reference's own, at output size."""
        if self.options.band_sigma > 0:
            unit = np.asarray(cv2.GaussianBlur(unit, (0, 0), self.options.band_sigma), dtype=np.float32)
        return upsample(unit, self.height, self.width, device=self.device)


def transport_with_confidence(
    motion: Iterable[Tensor],
    image: Tensor,
    *,
    options: ReferenceOptions | None = None,
    device: torch.device | None = None,
    temporal_factor: int = 4,
) -> Iterator[TransportedChunk]:
    """Return the transported reference chunk by chunk, with the confidence; frame 0 is the image exactly.

    Memory does not grow with length: held are the image's detail, the current chunk and a bounded look-ahead
    (`options.num_workers` frames plus one).

    Args:
        motion: uint8 pieces [n, h, w, 3] of any length, in order; read at most the look-ahead in advance.
        image: [3, H, W] float in [-1, 1], at output size.
        options: flow, confidence, band and workers.
        device: where to warp and where the chunks are wanted; the image's if None. The flow is computed on the CPU.
        temporal_factor: pixel frames per latent frame after the first.

    Raises:
        InvalidInputError: at the call: the image has another shape or type.
        VideoInputError: while iterating: so has the motion reference, or its frames do not divide into latent frames.
    """
    check_image(image)
    options = options or ReferenceOptions()
    image = image.to(torch.device(device or image.device), torch.float32)
    return map(_transported_chunk, in_chunks(_transported_frames(motion, image, options), temporal_factor))


def _transported_chunk(chunk: Tensor) -> TransportedChunk:
    return TransportedChunk(chunk[:, :3], chunk[:, 3:])


def _transported_frames(motion: Iterable[Tensor], image: Tensor, options: ReferenceOptions) -> Iterator[Tensor]:
    first, frames = split_first(single_frames(motion))
    next(frames)
    yield torch.cat((image, torch.ones_like(image[:1])))
    transport = on_this_stream(DetailTransport(first, image, options=options), image.device)
    yield from ahead(transport, frames, worker_count(options.num_workers))
