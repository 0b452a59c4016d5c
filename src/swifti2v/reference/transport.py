"""The image's detail carried along the motion: what the motion reference cannot hold, but says where it went.

Beyond the paper (docs/design.md 4). The residual ``image - upsample(motion frame 0)`` is warped to every frame and
added where the flow explains the frame. It is taken against the motion reference's own frame 0, so that whatever
softens all its frames alike is undone with it.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch

from swifti2v.reference.flow import CorrespondenceEstimator
from swifti2v.reference.frames import check_image, in_chunks, single_frames, split_first
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.replace import to_unit
from swifti2v.reference.resample import enlarge, upsample, warp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

MOST_WORKERS = 8


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
    workers = options.num_workers or min(os.cpu_count() or 1, MOST_WORKERS)
    transport = on_this_stream(DetailTransport(first, image, options=options), image.device)
    yield from _ahead(transport, frames, workers)


def on_this_stream(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `function` to be called in other threads, its CUDA work in the order of this thread's stream.

    The current stream belongs to a thread. Pool threads would work on the default one, and nothing would order that
    behind, or before, the stream of whoever reads their results.
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.current_stream(device)

    def called(item: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            return function(item)

    return called


def _ahead(function: Callable[[Tensor], Tensor], items: Iterator[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield ``function(item)`` in order, computed by threads at most ``workers + 1`` items ahead of the consumer."""
    pending: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="transport") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
