"""`light` as a stream: motion reference and image in, finished frames out, segment by segment.

What goes from segment to segment is the last finished frame, in eight bits, and the hidden state, in half precision:
both are kept with the segment (`FinishedSegment`), so a run that was stopped goes on as if it had not been, to the last
bit. Memory does not grow with the length: held are the image's detail, the frames of one segment in eight bits, and a
few prepared frames.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from swifti2v.light.inputs import GRID, Preparer, ahead, warped
from swifti2v.light.network import LightState, aligned
from swifti2v.reference.frames import check_image, in_chunks, single_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from swifti2v.light.inputs import Job, Prepared
    from swifti2v.light.network import LightNetwork
    from swifti2v.reference.options import ReferenceOptions

TEMPORAL_FACTOR = 4
LATENT_FRAMES_PER_SEGMENT = 3
MOST_WORKERS = 8


@dataclass(frozen=True)
class FinishedSegment:
    """A segment that is done, and all that the next one needs of it.

    Args:
        index: 0 for the segment that begins at frame 1.
        frames: uint8 [n, 3, H, W].
        hidden: float16 [1, hidden, h, w], the hidden state after the last frame.
    """

    index: int
    frames: Tensor
    hidden: Tensor


def nothing_finished(_index: int) -> FinishedSegment | None:
    """Say of every segment that it is still to be made."""
    return None


def refine(
    motion: Iterable[Tensor],
    image: Tensor,
    network: LightNetwork,
    *,
    options: ReferenceOptions | None = None,
    latent_frames_per_segment: int = LATENT_FRAMES_PER_SEGMENT,
    finished: Callable[[int], FinishedSegment | None] = nothing_finished,
    on_segment: Callable[[FinishedSegment], None] | None = None,
    half: bool | None = None,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Return the refined video chunk by chunk, [1, 3, f, H, W] float32 in [-1, 1], f = 1, then 4; eight-bit values.

    Frame 0 is the image exactly.

    Args:
        motion: uint8 pieces [n, h, w, 3] of any length and of any size up to the output's, in order; 4k + 1 frames.
        image: [3, H, W] float in [-1, 1], at output size, multiples of 8, on the device where the work is to be done.
        network: on the same device, in evaluation mode.
        options: of the transport.
        latent_frames_per_segment: M of the paper.
        finished: returns a segment that a former run has kept, by its index; it is not made again.
        on_segment: told of every segment made.
        half: bfloat16 in the convolutions; None where the processor computes with it (training did).
        workers: frames prepared at once; 0 means one per CPU core, at most 8.

    Raises:
        InvalidInputError: at the call: the image has another shape or type.
        VideoInputError: while iterating: so has the motion reference, or its frames do not divide into latent frames.
    """
    check_image(image)
    image = image.float()
    workers = workers or min(os.cpu_count() or 1, MOST_WORKERS)
    frames = _refined_frames(
        motion,
        image,
        network.to(memory_format=torch.channels_last),
        Preparer(image, options=options),
        segment_frames=latent_frames_per_segment * TEMPORAL_FACTOR,
        finished=finished,
        on_segment=on_segment or (lambda _segment: None),
        half=computes_half(image.device) if half is None else half,
        workers=workers,
    )
    return in_chunks(frames, TEMPORAL_FACTOR)


def computes_half(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())  # no public name yet
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _refined_frames(
    motion: Iterable[Tensor],
    image: Tensor,
    network: LightNetwork,
    preparer: Preparer,
    *,
    segment_frames: int,
    finished: Callable[[int], FinishedSegment | None],
    on_segment: Callable[[FinishedSegment], None],
    half: bool,
    workers: int,
) -> Iterator[Tensor]:
    yield image
    state = network.initial_state(image[None])
    made: list[Tensor] = []
    kept = _Kept(finished, segment_frames)

    def prepared(job: Job) -> tuple[int, Prepared | None]:
        return job.frame.index, None if kept.segment(job.frame.index) else preparer(job)

    pixels = (frame.cpu().numpy() for frame in single_frames(motion))
    for index, inputs in ahead(prepared, preparer.jobs(pixels, workers=workers), workers):
        segment = kept.segment(index)
        if inputs is None and segment is not None:
            frame = segment.frames[(index - 1) % segment_frames].to(image.device)
            state = LightState(_unit(frame)[None], segment.hidden.to(image.device).float())
            yield _unit(frame)
            continue
        assert inputs is not None
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=half):
            state = _step(network, inputs, state)
        del inputs
        frame = ((state.frame[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
        made.append(frame.cpu())
        if len(made) == segment_frames:
            segment = FinishedSegment((index - 1) // segment_frames, torch.stack(made), state.hidden.half().cpu())
            state = LightState(_unit(frame)[None], state.hidden.half().float())
            made.clear()
            on_segment(segment)
        yield _unit(frame)
    if made:
        on_segment(FinishedSegment((index - 1) // segment_frames, torch.stack(made), state.hidden.half().cpu()))


def _step(network: LightNetwork, inputs: Prepared, state: LightState) -> LightState:
    """Make a frame as ``network.step`` does, the last frame warped by OpenCV where that is faster."""
    height, width = inputs.base.shape[-2:]
    flow = F.interpolate(inputs.flow[None], size=(height, width), mode="bilinear", align_corners=False)[0] * GRID
    previous = warped(state.frame[0], flow)[None]
    hidden = aligned(state.hidden, inputs.flow[None], mode="bilinear")
    made: LightState = network(inputs.base[None], inputs.detail[None], inputs.evidence[None], previous, hidden)
    return made


class _Kept:
    """Segments of a former run, asked for once each; holds the last two."""

    def __init__(self, finished: Callable[[int], FinishedSegment | None], segment_frames: int) -> None:
        self._finished, self._segment_frames = finished, segment_frames
        self._known: dict[int, FinishedSegment | None] = {}
        self._lock = Lock()

    def segment(self, frame: int) -> FinishedSegment | None:
        """Return the segment of a frame, if it was kept."""
        index = (frame - 1) // self._segment_frames
        with self._lock:
            if index not in self._known:
                self._known[index] = self._finished(index)
                self._known.pop(index - 3, None)
            return self._known[index]


def _unit(frame: Tensor) -> Tensor:
    return frame.float() / 127.5 - 1
