"""`light` as a stream: motion reference and image in, finished frames out, segment by segment.

What goes from segment to segment is the last finished frame, in eight bits, and the hidden state, in half precision:
both are kept with the segment (`FinishedSegment`), so a run that was stopped goes on as if it had not been, to the last
bit. Memory does not grow with the length: held are the image's detail, the frames of one segment in eight bits, and a
few prepared frames.

Shapes: H, W output; h, w motion reference; n frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from swifti2v.geometry import CodecGeometry
from swifti2v.light.inputs import GRID, Preparer, warped
from swifti2v.light.network import LightState, aligned, channels_last
from swifti2v.reference.frames import check_image, in_chunks, single_frames
from swifti2v.reference.workers import ahead, on_this_stream, worker_count
from swifti2v.settings import GenerationSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from swifti2v.light.inputs import Job, Prepared
    from swifti2v.light.network import LightNetwork
    from swifti2v.reference.options import ReferenceOptions

TEMPORAL_FACTOR = CodecGeometry().temporal


@dataclass(frozen=True)
class FinishedSegment:
    """A segment that is done, and all that the next one needs of it.

    Args:
        index: 0 for the segment that begins at frame 1.
        frames: uint8 [n, 3, H, W].
        hidden: float16 [1, hidden, H / 4, W / 4], the hidden state after the last frame.
    """

    index: int
    frames: Tensor
    hidden: Tensor


def nothing_finished(_index: int) -> FinishedSegment | None:
    """Say of every segment that it is still to be made."""
    return None


def tell_nobody(_segment: FinishedSegment) -> None:
    """Take note of a segment and do nothing."""


def refine(
    motion: Iterable[Tensor],
    image: Tensor,
    network: LightNetwork,
    *,
    options: ReferenceOptions | None = None,
    segment_size: int = GenerationSettings.segment_size,
    finished: Callable[[int], FinishedSegment | None] = nothing_finished,
    on_segment: Callable[[FinishedSegment], None] = tell_nobody,
    half: bool | None = None,
) -> Iterator[Tensor]:
    """Return the refined video chunk by chunk, [1, 3, f, H, W] float32 in [-1, 1], f = 1, then 4; eight-bit values.

    Frame 0 is the image exactly.

    Args:
        motion: uint8 pieces [n, h, w, 3] of any length and of any size up to the output's, in order; 4k + 1 frames.
        image: [3, H, W] float in [-1, 1], at output size, multiples of 8, on the device where the work is to be done.
        network: on the same device, in evaluation mode.
        options: of the transport, and the frames that are prepared at once (`num_workers`).
        segment_size: latent frames of a segment (M of the paper).
        finished: returns a segment that a former run has kept, by its index; it is not made again.
        on_segment: told of every segment made.
        half: bfloat16 in the convolutions; None where the processor computes with it (training did).

    Raises:
        InvalidInputError: at the call: the image has another shape or type.
        VideoInputError: while iterating: so has the motion reference, or its frames do not divide into latent frames.
    """
    check_image(image)
    image = image.float()
    preparer = Preparer(image, options=options)
    stream = _Stream(
        preparer,
        channels_last(network),
        segment_frames=segment_size * TEMPORAL_FACTOR,
        finished=finished,
        on_segment=on_segment,
        half=computes_half(image.device) if half is None else half,
        workers=worker_count(preparer.options.num_workers),
    )
    return in_chunks(stream.frames(motion), TEMPORAL_FACTOR)


def computes_half(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())  # no public name yet
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class _Stream:
    """One run of `refine`."""

    preparer: Preparer
    network: LightNetwork
    segment_frames: int
    finished: Callable[[int], FinishedSegment | None]
    on_segment: Callable[[FinishedSegment], None]
    half: bool
    workers: int

    def frames(self, motion: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield single frames [3, H, W]: the image, then each frame made, or taken from a segment that is kept."""
        image = self.preparer.image
        yield image
        state = self.network.initial_state(image[None])
        made: list[Tensor] = []
        number = 0
        for index, inputs in self._inputs(motion):
            number, place = divmod(index - 1, self.segment_frames)
            if isinstance(inputs, FinishedSegment):
                frame = inputs.frames[place].to(image.device)
                state = LightState(_unit(frame)[None], inputs.hidden.to(image.device).float())
                yield _unit(frame)
                continue
            with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=self.half):
                state = _step(self.network, inputs, state)
            del inputs
            frame = ((state.frame[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
            made.append(frame.cpu())
            if len(made) == self.segment_frames:
                hidden = state.hidden.half()
                state = LightState(_unit(frame)[None], hidden.float())
                self.on_segment(FinishedSegment(number, torch.stack(made), hidden.cpu()))
                made.clear()
            yield _unit(frame)
        if made:
            self.on_segment(FinishedSegment(number, torch.stack(made), state.hidden.half().cpu()))

    def _inputs(self, motion: Iterable[Tensor]) -> Iterator[tuple[int, Prepared | FinishedSegment]]:
        """Yield the index of each frame from 1, and what it is made of or taken from."""
        pixels = (frame.cpu().numpy() for frame in single_frames(motion))

        def prepared(work: tuple[Job, FinishedSegment | None]) -> tuple[int, Prepared | FinishedSegment]:
            job, kept = work
            return job.frame.index, kept or self.preparer(job)

        jobs = self._with_kept(self.preparer.jobs(pixels, workers=self.workers))
        return ahead(on_this_stream(prepared, self.preparer.image.device), jobs, self.workers)

    def _with_kept(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, FinishedSegment | None]]:
        """Pair each frame with its segment, if a former run has kept that."""
        kept: FinishedSegment | None = None
        for job in jobs:
            number, place = divmod(job.frame.index - 1, self.segment_frames)
            if place == 0:
                kept = self.finished(number)
            yield job, kept


def _step(network: LightNetwork, inputs: Prepared, state: LightState) -> LightState:
    """Make a frame as ``network.step`` does, the last frame warped by OpenCV where that is faster."""
    height, width = inputs.base.shape[-2:]
    flow = F.interpolate(inputs.flow[None], size=(height, width), mode="bilinear", align_corners=False)[0] * GRID
    previous = warped(state.frame[0], flow)[None]
    hidden = aligned(state.hidden, inputs.flow[None], mode="bilinear")
    made: LightState = network(inputs.base[None], inputs.detail[None], inputs.evidence[None], previous, hidden)
    return made


def _unit(frame: Tensor) -> Tensor:
    return frame.float() / 127.5 - 1
