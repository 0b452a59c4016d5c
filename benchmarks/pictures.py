"""Labelled rows of pictures, and the place of a frame that is worth looking at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swifti2v.evaluation.motion import FramePair, unit_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]

GAP = 8
LABEL_HEIGHT = 36
PAPER, INK = (255, 255, 255), (32, 32, 36)
MARK = (255, 196, 0)
JPEG_QUALITY = 92


class Place(NamedTuple):
    """A rectangle of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, frame: Array) -> Array:
        """Return this part of a frame [H, W, C]."""
        return frame[self.top : self.top + self.height, self.left : self.left + self.width]


class Panel(NamedTuple):
    """A picture [H, W, 3] uint8 and what is written above it."""

    label: str
    pixels: Array


def most_different_place(first: Array, second: Array, size: Size) -> Place:
    """Return the rectangle of `size` over which two frames [H, W, 3] differ most, by their mean absolute difference."""
    difference = np.abs(unit_rgb(first) - unit_rgb(second)).mean(axis=-1)
    sums = cv2.integral(difference)
    width, height = (min(side, limit) for side, limit in zip(size, difference.shape[::-1], strict=True))
    windows = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return Place(int(left), int(top), width, height)


def followed(place: Place, image: Array, frame: Array) -> Place:
    """Return where in `image` the content at `place` of `frame` is found, by the median optical flow there."""
    flow = place.of(FramePair(image, frame).backward)
    x, y = (round(float(value)) for value in np.median(flow.reshape(-1, 2), axis=0))
    left = min(max(place.left + x, 0), image.shape[1] - place.width)
    top = min(max(place.top + y, 0), image.shape[0] - place.height)
    return place._replace(left=left, top=top)


def enlarged(pixels: Array, factor: int) -> Array:
    """Return a picture enlarged by repeating pixels: nothing is smoothed that one would want to see."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def fitted(pixels: Array, width: int) -> Array:
    """Return a picture reduced to `width`, antialiased."""
    height = round(pixels.shape[0] * width / pixels.shape[1])
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))


def marked(frame: Array, place: Place, thickness: int = 4) -> Array:
    """Return a frame with a rectangle drawn around `place`."""
    drawn = np.ascontiguousarray(frame).copy()
    corner = (place.left + place.width - 1, place.top + place.height - 1)
    return np.asarray(cv2.rectangle(drawn, (place.left, place.top), corner, MARK, thickness))


def row(panels: Sequence[Panel]) -> Array:
    """Return panels beside each other with their labels above, uint8 [H, W, 3]."""
    height = max(panel.pixels.shape[0] for panel in panels) + LABEL_HEIGHT
    width = sum(panel.pixels.shape[1] for panel in panels) + GAP * (len(panels) - 1)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    left = 0
    for panel in panels:
        font = _font(draw, panel.label, panel.pixels.shape[1])
        draw.text((left + 2, LABEL_HEIGHT // 2), panel.label, fill=INK, font=font, anchor="lm")
        canvas.paste(Image.fromarray(np.ascontiguousarray(panel.pixels)), (left, LABEL_HEIGHT))
        left += panel.pixels.shape[1] + GAP
    return np.asarray(canvas)


def sheet(rows: Sequence[Array]) -> Array:
    """Return rows under each other, uint8 [H, W, 3], flushed left."""
    width = max(pixels.shape[1] for pixels in rows)
    padded = [
        np.pad(pixels, ((0, GAP), (0, width - pixels.shape[1]), (0, 0)), constant_values=PAPER[0]) for pixels in rows
    ]
    return np.concatenate(padded)


def save(pixels: Array, path: Path) -> Path:
    """Write a picture, PNG or JPEG by its name, with a margin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    framed = np.pad(pixels, ((GAP, 0), (GAP, GAP), (0, 0)), constant_values=PAPER[0])
    Image.fromarray(framed).save(path, quality=JPEG_QUALITY)
    return path


def _font(draw: ImageDraw.ImageDraw, label: str, width: int) -> Any:
    """Return the largest font in which the label is no wider than its panel."""
    for size in (24, 22, 20, 18, 16, 14, 12):
        font = ImageFont.load_default(size)
        if draw.textlength(label, font=font) <= width - 4:
            break
    return font
