"""Sizes that clips are brought to: of about one area, of several aspects, each divisible as codec and network need.

A clip goes to the bucket of the nearest aspect and is never enlarged: a smaller one is skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

_AREA_TOLERANCE = 0.08
_TARGET = Size(1280, 704)


@dataclass(frozen=True)
class BucketOptions:
    """Which buckets there are.

    Args:
        target: the size to train at; every bucket has about its area.
        size_multiple: both sides are multiples of it (`CodecGeometry.size_multiple`: 32 for Wan2.2-TI2V-5B, 16 for
            Wan2.1's codec with patches of 2).
        max_aspect: largest ratio of the sides of a bucket; 1 makes `target` the only one.
    """

    target: Size = _TARGET
    size_multiple: int = CodecGeometry().size_multiple
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` unless the target is divisible and the aspect at least 1."""
        multiple, target = self.size_multiple, self.target
        if multiple < 1 or min(target) < multiple or target.width % multiple or target.height % multiple:
            msg = f"the target size {target} is not a multiple of {multiple} on both sides; choose one that is"
            raise InvalidInputError(msg)
        if not (math.isfinite(self.max_aspect) and self.max_aspect >= 1):
            msg = f"max_aspect is {self.max_aspect}; use 1 or more"
            raise InvalidInputError(msg)


def make_buckets(options: BucketOptions) -> tuple[Size, ...]:
    """Return the target and every other size within 8% of its area up to `max_aspect`, the tallest first.

    Of each width the height that comes nearest to the area is taken.
    """
    target, multiple = options.target, options.size_multiple
    area = target.width * target.height
    buckets = {target}
    if options.max_aspect > 1:
        limit = math.sqrt(area * options.max_aspect) * (1 + _AREA_TOLERANCE)
        for width in range(multiple, int(limit) + 1, multiple):
            size = Size(width, max(1, round(area / width / multiple)) * multiple)
            aspect = max(size) / min(size)
            if abs(size.width * size.height / area - 1) <= _AREA_TOLERANCE and aspect <= options.max_aspect:
                buckets.add(size)
    return tuple(sorted(buckets, key=_log_aspect))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose aspect is nearest to that of `size`, by ratio; of equals the larger."""
    aspect = _log_aspect(size)
    return min(buckets, key=lambda bucket: (abs(_log_aspect(bucket) - aspect), -bucket.width * bucket.height))


def covers(size: Size, bucket: Size) -> bool:
    """Whether a picture of `size` fills `bucket` without being enlarged."""
    return size.width >= bucket.width and size.height >= bucket.height


def _log_aspect(size: Size) -> float:
    return math.log(size.width / size.height)
