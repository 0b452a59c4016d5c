"""The hybrid reference by either rule: the one entry that pipelines, training and evaluation use."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.replace import replace_first_frame
from swifti2v.reference.transport import transport_with_confidence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import Tensor


def hybrid_reference(
    motion: Iterable[Tensor],
    image: Tensor,
    *,
    options: ReferenceOptions | None = None,
    device: torch.device | None = None,
    temporal_factor: int = 4,
) -> Iterator[Tensor]:
    """Yield the hybrid reference in pixels, one chunk for each latent frame; frame 0 is the image exactly.

    Args:
        motion: uint8 pieces [n, h, w, 3] of any length, in order; consumed lazily.
        image: [3, H, W] float in [-1, 1], at output size.
        options: `replace` or `transport`, and how; the defaults of `ReferenceOptions` if None.
        device: where to work and where the chunks are wanted; the image's if None.
        temporal_factor: pixel frames per latent frame after the first.

    Returns:
        Chunks [1, 3, f, H, W] float32 in [-1, 1], f = 1, then `temporal_factor`.

    Raises:
        InvalidInputError: the image has another shape or type.
        VideoInputError: so has the motion reference, or its frames do not divide into latent frames.
    """
    options = options or ReferenceOptions()
    if options.mode == "replace":
        return replace_first_frame(motion, image, device=device, temporal_factor=temporal_factor)
    chunks = transport_with_confidence(motion, image, options=options, device=device, temporal_factor=temporal_factor)
    # Not a generator expression: that would keep the last chunk, 231 MB at 2560x1408, while its reader is at work.
    return map(attrgetter("frames"), chunks)
