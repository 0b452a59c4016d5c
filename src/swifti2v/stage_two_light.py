"""Stage II by `light`: any motion reference refined in pixel space, with what is finished kept in a work directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swifti2v.light import refine as light
from swifti2v.light.weights import load_network
from swifti2v.pixels import to_uint8
from swifti2v.reference.options import ReferenceOptions
from swifti2v.settings import GenerationSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from swifti2v.work_directory import WorkDirectory


def refine_by_light(
    motion: Iterable[Tensor],
    image: Tensor,
    work: WorkDirectory,
    *,
    segment_size: int = GenerationSettings.segment_size,
    flow_scale: float = GenerationSettings.flow_scale,
    on_segment: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Refine any motion reference by `light`, segment by segment, without a checkpoint; yield as `SwiftI2V.stream`.

    Args:
        motion: uint8 pieces [n,h,w,3], 4k+1 frames in all.
        image: [3,H,W] in [-1,1], on the device where the work is to be done.
        work: what is finished.
        segment_size: latent frames that a segment makes (M of the paper).
        flow_scale: size of the optical flow to frame 0, as a fraction of the output.
        on_segment: told the number, from 1, of every segment made, once it is kept.
    """

    def keep(segment: light.FinishedSegment) -> None:
        work.keep_frames_of_segment(segment)
        if on_segment is not None:
            on_segment(segment.index + 1)

    frames = light.refine(
        motion,
        image,
        load_network(image.device),
        options=ReferenceOptions(flow_scale=flow_scale),
        segment_size=segment_size,
        finished=work.frames_of_segment,
        on_segment=keep,
    )
    yield from map(to_uint8, frames)
