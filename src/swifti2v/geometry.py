"""Pixel and latent sizes: the frame arithmetic of a causal video codec, written once. Pure Python.

Words (paper, section CSG; `docs/design.md` 1): latent frame 0 holds pixel frame 0; latent frame j >= 1 holds the
`temporal` pixel frames ``temporal * (j - 1) + 1 .. temporal * j``.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from typing import NamedTuple

from swifti2v.errors import InvalidInputError


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        """Return the form in which users write it, ``1280x704``."""
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``WIDTHxHEIGHT``; raise `InvalidInputError` if the text has another form."""
        match = re.fullmatch(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*", text)
        if match is None:
            msg = f"size {text!r} is not of the form WIDTHxHEIGHT; write for instance 1280x704"
            raise InvalidInputError(msg, param="size", value=text)
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, value: object) -> Size:
        """Return a size given as `Size`, ``(width, height)`` or ``"WIDTHxHEIGHT"``.

        Raises:
            InvalidInputError: `value` is none of these.
        """
        match value:
            case str():
                return cls.parse(value)
            case [int() as width, int() as height] if not isinstance(width, bool) and not isinstance(height, bool):
                return cls(width, height)
        msg = f"size is {reprlib.repr(value)}; give width and height, for instance 1280x704 or (1280, 704)"
        raise InvalidInputError(msg, param="size", value=value)


class LatentShape(NamedTuple):
    """Frames, height and width of a latent video (channels belong to the codec)."""

    num_latent_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class CodecGeometry:
    """How a causal video codec maps pixels to latents, and a DiT maps latents to tokens.

    Args:
        spatial: pixels per latent cell along height and width.
        temporal: pixel frames per latent frame after the first.
        patch: latent cells per token along height and width.
    """

    spatial: int = 16
    temporal: int = 4
    patch: int = 2

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels must be multiples of this (32 for Wan2.2-TI2V-5B)."""
        return self.spatial * self.patch

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of `num_frames` pixel frames; raise `InvalidInputError` unless these are ``temporal*k+1``."""
        if num_frames < 1 or (num_frames - 1) % self.temporal:
            below = max(num_frames - 1, 0) // self.temporal * self.temporal + 1
            msg = (
                f"a clip of {num_frames} frames does not divide into latent frames; "
                f"use {self.temporal}k+1 frames, for instance {below} or {below + self.temporal}"
            )
            raise InvalidInputError(msg, param="num_frames", value=num_frames)
        return (num_frames - 1) // self.temporal + 1

    def pixel_frames(self, num_latent_frames: int) -> int:
        """Pixel frames of a clip of `num_latent_frames` latent frames."""
        return (num_latent_frames - 1) * self.temporal + 1

    def frames_of(self, latent_frame: int) -> range:
        """Indices of the pixel frames that latent frame `latent_frame` holds."""
        if latent_frame == 0:
            return range(1)
        start = self.temporal * (latent_frame - 1) + 1
        return range(start, start + self.temporal)

    def check_size(self, size: Size) -> None:
        """Raise `InvalidInputError` with the nearest usable size unless both sides are multiples of `size_multiple`."""
        multiple = self.size_multiple
        if min(size) >= multiple and size.width % multiple == 0 and size.height % multiple == 0:
            return
        nearest = nearest_size(size, multiple)
        msg = f"size {size} is not a multiple of {multiple} on both sides; the nearest is {nearest}"
        raise InvalidInputError(msg, param="size", value=size)

    def latent_shape(self, size: Size, num_frames: int) -> LatentShape:
        """Shape of the latent video of a clip; raise `InvalidInputError` for sizes or lengths that do not divide."""
        self.check_size(size)
        return LatentShape(self.latent_frames(num_frames), size.height // self.spatial, size.width // self.spatial)

    def tokens_per_frame(self, size: Size) -> int:
        """DiT tokens of one latent frame at `size`."""
        self.check_size(size)
        return (size.height // self.size_multiple) * (size.width // self.size_multiple)


def nearest_size(size: Size, multiple: int) -> Size:
    """Return the size nearest to `size` whose sides are positive multiples of `multiple`."""
    return Size(*(max(multiple, round(side / multiple) * multiple) for side in size))


def motion_size(size: Size, *, reduction: float, max_area: int | None, multiple: int) -> Size:
    """Return the size of the motion reference of an output of `size`: 640x352 of 2560x1408 for Wan2.2.

    Args:
        size: of the output.
        reduction: output size over motion size, at the least.
        max_area: pixels of a motion frame at most, to within the rounding to `multiple`; None: no limit.
        multiple: of which both sides are made, the codec's factor times the patch of Stage I.
    """
    factor = reduction if max_area is None else max(reduction, math.sqrt(size.width * size.height / max_area))
    return nearest_size(Size(round(size.width / factor), round(size.height / factor)), multiple)
