"""The pictures of a report: each metric over time, and crops where the videos differ most."""

from __future__ import annotations

import base64
import io
import math
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from swifti2v.errors import OutputError
from swifti2v.evaluation.sources import fitted
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.evaluation.results import Curve, Evaluation
    from swifti2v.evaluation.sources import FrameSource

Array = np.ndarray[Any, Any]

SERIES_COLORS = ("#0067a8", "#b34400", "#00735c", "#a3307f", "#7a5c00", "#4d4d4d")
"""Colors of the videos, in their order; the page's style sheet names the same as ``--series-1`` to ``--series-6``."""
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

IMAGE_LABEL = "input image"
_CROPS_AFTER_FIRST = 3
_SMALLEST_CROP, _LARGEST_CROP = 32, 192
_DIFFERENCE_WIDTH = 320  # of the map in which the largest difference is looked for


@dataclass(frozen=True)
class Picture:
    """A picture ready for a page.

    Args:
        label: what it is called: a metric, or a video.
        alt: what it shows, for those who do not see it.
        uri: the file itself as a data URI.
    """

    label: str
    alt: str
    uri: str


@dataclass(frozen=True)
class CropRow:
    """The same place of the same frame in every video, pixel for pixel.

    Args:
        frame: index of the frame.
        left, top, side: the square in pixels of the first video.
        compared: the two between which the difference is largest there.
        difference: between these two, mean absolute over the square and the channels, 0 .. 255.
        pictures: the crop of each video, then of the truth, then (frame 0) of the image.
    """

    frame: int
    left: int
    top: int
    side: int
    compared: tuple[str, str]
    difference: float
    pictures: tuple[Picture, ...]


def make_plots(evaluation: Evaluation) -> tuple[Picture, ...]:
    """Return a plot for each metric that has a curve with a number in it, in the order of the metrics.

    Raises:
        OutputError: matplotlib is not installed.
    """
    plots = []
    for metric in evaluation.metrics:
        curves = {
            index: curve
            for index, video in enumerate(evaluation.videos)
            for curve in video.curves
            if curve.metric == metric.name and any(map(math.isfinite, curve.values))
        }
        if curves:
            words = "; ".join(f"{evaluation.videos[index].label}: {_in_words(curves[index])}" for index in curves)
            best = {"one": 1.0, "zero": 0.0}.get(metric.better)
            plots.append(Picture(metric.label, f"{metric.label} over time. {words}", _drawn(curves, best)))
    return tuple(plots)


def _in_words(curve: Curve) -> str:
    values = [value for value in curve.values if math.isfinite(value)]
    return f"mean {math.fsum(values) / len(values):.4g}, from {min(values):.4g} to {max(values):.4g}"


def _drawn(curves: dict[int, Curve], best: float | None) -> str:
    """Draw curves by the number of their video; return the data URI of an SVG file."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "a report needs matplotlib, which is not installed; run: pip install 'swifti2v[evaluate]'"
        raise OutputError(msg) from error
    with style.context(["default", {"svg.hashsalt": "swifti2v"}]):  # whatever the user's own style is
        figure = Figure(figsize=(6.2, 3.3), layout="constrained")
        axes = figure.subplots()
        for index, curve in curves.items():
            values = np.where(np.isfinite(curve.values), curve.values, np.nan)
            kind = {"color": SERIES_COLORS[index % len(SERIES_COLORS)], "linestyle": _DASHES[index % len(_DASHES)]}
            axes.plot(curve.frames, values, marker="o" if len(values) < 12 else "", markersize=4, **kind)
        low, high = axes.get_ylim()
        if best is not None and low - 0.25 * (high - low) <= best <= high + 0.25 * (high - low):
            axes.axhline(best, color="black", linewidth=0.9)
        axes.set_xlabel("frame")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.4)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _data_uri("svg+xml", file.getvalue())


def make_crops(sources: Sequence[FrameSource], image: Array | None) -> tuple[CropRow, ...]:
    """Return the place of largest difference in frame 0 and in each third of the time after it.

    The first two videos are compared; one video alone with the image, in frame 0. All are read side by side, each of
    them once; one frame of each is in memory.

    Args:
        sources: the videos, the truth last.
        image: uint8 [H, W, 3] of the first video's size, or None.

    Raises:
        VideoInputError: a video is damaged.
    """
    if not sources:
        return ()
    labels, size = [source.label for source in sources], sources[0].size
    side = min(max(_SMALLEST_CROP, min(size) // 4), _LARGEST_CROP, *size)
    last = min(source.num_frames or 0 for source in sources[:2]) - 1
    ends = [0, *(round(last * part / _CROPS_AFTER_FIRST) for part in range(1, _CROPS_AFTER_FIRST + 1))]
    best: dict[int, CropRow] = {}  # by the stretch of time
    with ExitStack() as stack:
        readers = [islice(stack.enter_context(closing(source.frames())), source.num_frames) for source in sources]
        for index, frames in enumerate(zip_longest(*readers)):
            shown = {
                label: fitted(frame, size) for label, frame in zip(labels, frames, strict=True) if frame is not None
            }
            if index == 0 and image is not None:
                shown[IMAGE_LABEL] = image
            stretch = next((number for number, end in enumerate(ends) if index <= end), None)
            one, other = labels[0], labels[1] if len(labels) > 1 else IMAGE_LABEL
            if stretch is None or not {one, other} <= shown.keys():
                continue
            taken = [(row.left, row.top) for number, row in best.items() if number != stretch]
            difference, left, top = largest_difference(shown[one], shown[other], side=side, taken=taken)
            if stretch not in best or difference > best[stretch].difference:
                place = (slice(top, top + side), slice(left, left + side))
                words = f"frame {index}: {side} pixels square from x {left}, y {top}"
                crops = tuple(
                    encode_picture(frame[place], label, f"{label}, {words}") for label, frame in shown.items()
                )
                best[stretch] = CropRow(index, left, top, side, (one, other), difference, crops)
    return tuple(best[stretch] for stretch in sorted(best))


def largest_difference(
    first: Array, second: Array, *, side: int, taken: Sequence[tuple[int, int]] = ()
) -> tuple[float, int, int]:
    """Return ``(mean difference, left, top)`` of the square of `side` pixels in which two frames differ most.

    Both are uint8 [H, W, 3] of one size; the difference is the mean absolute one over the channels, 0 .. 255, looked
    for on a map at most 320 pixels wide. Squares that overlap one at `taken` (left, top) are left out unless nothing
    else remains.
    """
    height, width = first.shape[:2]
    scale = min(1.0, _DIFFERENCE_WIDTH / width)
    small = Size(max(1, round(width * scale)), max(1, round(height * scale)))
    difference = cv2.absdiff(first, second).mean(axis=-1, dtype=np.float32)
    difference = cv2.resize(difference, small, interpolation=cv2.INTER_AREA)
    window = max(1, min(round(side * scale), *small))
    sums = cv2.boxFilter(difference, -1, (window, window), anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    scores = sums[: small.height - window + 1, : small.width - window + 1].copy()
    free = scores.copy()
    for left, top in taken:
        rows, columns = (
            slice(max(0, round(place * scale) - window + 1), round(place * scale) + window) for place in (top, left)
        )
        free[rows, columns] = -1
    if free.max() >= 0:
        scores = free
    y, x = np.unravel_index(int(scores.argmax()), scores.shape)
    left, top = (min(round(int(place) / scale), limit - side) for place, limit in ((x, width), (y, height)))
    return float(scores[y, x]), left, top


def encode_picture(frame: Array, label: str, alt: str) -> Picture:
    """Return uint8 RGB [H, W, 3] as a PNG."""
    _, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR))
    return Picture(label, alt, _data_uri("png", data.tobytes()))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
