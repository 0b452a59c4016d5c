"""Does a video move evenly, and stay as sharp and bright as it began? What lurches or pulses, in numbers and words.

All of it is made of a few numbers per frame. A video that does not move gets no number here: a still picture would win.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from swifti2v.evaluation.motion import luma, optical_flow, shown_before

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swifti2v.evaluation.drift import Look

Array = np.ndarray[Any, Any]

TEMPORAL_FACTOR = 4
"""Pixel frames per latent frame."""

BLOCKS = 4  # rows and columns of blocks, so that a zoom, a rotation or a swaying tree counts as motion too
STILL_BELOW = 0.05  # pixels a frame: less is the noise of the flow
SMALLEST_UNCOVERED = 0.005  # share of all pixels below which their error says nothing
UNCOVERED_LONG_SIDE = 640
JOLT = 0.4  # share of the steps that has to repeat to be called a jolt; a real pan of 33 frames reached 0.28 by chance

EVENNESS = (
    "judder",
    "first_step",
    "backward_steps",
    "motion_pulse",
    "motion_pulse_borders",
    "sharpness_kept",
    "sharpness_pulse",
    "brightness_deviation",
    "brightness_pulse",
    "brightness_pulse_borders",
    "first_color_offset",
)
"""Names of the values that `evenness` returns."""


def block_steps(flow: Array) -> Array:
    """Return the median displacement in each of 4x4 blocks, [32] float, in pixels, of a flow [H, W, 2]."""
    rows = np.array_split(flow[::2, ::2], BLOCKS, axis=0)
    blocks = [block for row in rows for block in np.array_split(row, BLOCKS, axis=1)]
    return np.concatenate([np.median(block.reshape(-1, 2), axis=0) for block in blocks])


def evenness(steps: Sequence[Array], looks: Sequence[Look], *, segment_size: int | None) -> dict[str, float]:
    """Return the values of `EVENNESS`; each is NaN if the video does not move, or is too short for it.

    Args:
        steps: `block_steps` from each frame to the next.
        looks: of each frame.
        segment_size: latent frames in a segment, for what repeats at the borders of segments; None leaves that out.
    """
    if not moves(steps):
        return dict.fromkeys(EVENNESS, math.nan)
    moved = np.asarray(steps, np.float64)
    size = root_mean_square(moved)
    sharpness = np.asarray([look.laplacian for look in looks])
    brightness = 255 * np.asarray([look.brightness for look in looks])
    colors = 255 * np.asarray([(look.red, look.green, look.blue) for look in looks])
    return {
        "judder": judder(moved),
        "first_step": first_step(moved),
        "backward_steps": backward_steps(moved),
        "motion_pulse": pulse(moved) / size,
        "motion_pulse_borders": border_pulse(moved, segment_size) / size,
        "sharpness_kept": float(sharpness[1] / sharpness[0]) if sharpness[0] > 0 else math.nan,
        "sharpness_pulse": 100 * pulse(sharpness[1:, None] / max(float(sharpness[1:].mean()), 1e-9)),
        "brightness_deviation": deviation_from_line(brightness),
        "brightness_pulse": pulse(brightness[:, None]),
        "brightness_pulse_borders": border_pulse(brightness[:, None], segment_size),
        "first_color_offset": first_color_offset(colors),
    }


def moves(steps: Sequence[Array]) -> bool:
    """Whether blocks move by more than the noise of the flow: 0.05 pixels a frame, root mean square."""
    return bool(steps) and root_mean_square(np.asarray(steps)) * math.sqrt(2) >= STILL_BELOW


def judder(steps: Array) -> float:
    """Return the RMS of the change of the displacement from step to step over the RMS of the displacement.

    0 is even; a hand-held pan has 0.4 to 0.5; steps without any connection would have 1.41. NaN for fewer than two
    steps.

    Args:
        steps: [number of steps, components], in pixels.
    """
    return root_mean_square(np.diff(steps, axis=0)) / root_mean_square(steps) if len(steps) > 1 else math.nan


def first_step(steps: Array) -> float:
    """Return the length of the first step over the median length of the steps; 1 is like the others."""
    lengths = np.sqrt((steps**2).mean(axis=1))
    usual = float(np.median(lengths))
    return float(lengths[0]) / usual if usual > 0 else math.nan


def backward_steps(steps: Array) -> float:
    """Return the percentage of steps against the direction of the whole motion; NaN for motion to and fro.

    A step goes backward if its component along the mean step is below -0.05 pixels and below -5% of the median step.
    """
    total = steps.sum(axis=0)
    way = float(np.linalg.norm(total))
    if way < 0.5 * float(np.linalg.norm(steps, axis=1).sum()):
        return math.nan
    along = steps @ (total / way) / math.sqrt(steps.shape[1] / 2)
    limit = max(STILL_BELOW, 0.05 * float(np.median(np.abs(along))))
    return 100 * float((along < -limit).mean())


def pulse(series: Array, *, lag: int = TEMPORAL_FACTOR, beside: int = 1) -> float:
    """Return the size of what repeats every `lag` frames, in the units of the series; >= 0.

    With C the covariance of the series with itself so many frames later: the root of C(lag) less the mean of
    C(lag - beside) and C(lag + beside), 0 where that is negative. What changes slowly is equal in all three. NaN if the
    series is shorter than two periods.

    Args:
        series: [frames, components].
        lag: period, in frames.
        beside: distance of the lags that it is held against.
    """
    if len(series) < max(2 * lag, lag + beside + 2):
        return math.nan
    centered = series - series.mean(axis=0)

    def covariance(frames: int) -> float:
        return float((centered[frames:] * centered[:-frames]).mean())

    return math.sqrt(max(0.0, covariance(lag) - (covariance(lag - beside) + covariance(lag + beside)) / 2))


def border_pulse(series: Array, segment_size: int | None) -> float:
    """Return the `pulse` at the borders of segments beside that at the other borders of latent frames."""
    if segment_size is None:
        return math.nan
    return pulse(series, lag=TEMPORAL_FACTOR * segment_size, beside=TEMPORAL_FACTOR)


def deviation_from_line(values: Array) -> float:
    """Return the standard deviation of values over time from the straight line through them; [frames]."""
    if len(values) < 3:
        return math.nan
    places = np.arange(len(values))
    return float((values - np.polyval(np.polyfit(places, values, 1), places)).std())


def first_color_offset(colors: Array) -> float:
    """Return by how much the mean color changes from frame 0 to 1 beyond its median change after that; >= 0.

    Args:
        colors: mean red, green and blue of each frame, [frames, 3], in levels of 255; the channel that changes most
            counts.
    """
    changes = np.abs(np.diff(colors, axis=0))
    if len(changes) < 2:
        return math.nan
    return max(0.0, float((changes[0] - np.median(changes[1:], axis=0)).max()))


def root_mean_square(values: Array) -> float:
    """Return the root of the mean square over all entries."""
    return math.sqrt(float((np.asarray(values, np.float64) ** 2).mean()))


class Uncovered:
    """Tells which pixels of a video show what its frame 0 did not; called with its frames in turn."""

    def __init__(self) -> None:
        self._gray: Array | None = None
        self._persists: Array | None = None

    def __call__(self, frame: Array) -> Array:
        """Return where `frame`, RGB [H, W, 3], shows what came into view since frame 0: [H, W] bool.

        Flow and map are of frames reduced to a long side of 640 pixels.
        """
        height, width = frame.shape[:2]
        scale = min(1.0, UNCOVERED_LONG_SIDE / max(height, width))
        gray = np.asarray(cv2.resize(luma(frame), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        persists = np.ones(gray.shape, np.uint8)
        if self._gray is not None and self._persists is not None:
            back = optical_flow(gray, self._gray)
            seen, (x, y) = shown_before(back, optical_flow(self._gray, gray))
            carried = cv2.remap(self._persists, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
            persists = np.asarray(cv2.medianBlur(np.asarray(carried) * seen.astype(np.uint8), 5))
        self._gray, self._persists = gray, persists
        return np.asarray(cv2.resize(1 - persists, (width, height), interpolation=cv2.INTER_NEAREST), dtype=bool)


def split_error(frame: Array, truth: Array, uncovered: Array) -> Array:
    """Return squared error and number of pixels where `uncovered`, then elsewhere; [2, 2] float."""
    squared = ((frame.astype(np.float32) - truth.astype(np.float32)) ** 2).mean(axis=-1) / 255**2
    return np.asarray([[float(squared[where].sum()), int(where.sum())] for where in (uncovered, ~uncovered)])


def split_psnr(errors: Sequence[Array]) -> tuple[float, float]:
    """Return the PSNR in dB of what was uncovered and of what persists, of the errors of all frames (`split_error`).

    NaN where fewer than 0.5% of the pixels are of that kind; at most 100.
    """
    total = np.sum(errors, axis=0) if len(errors) else np.zeros((2, 2))
    few = SMALLEST_UNCOVERED * total[:, 1].sum()
    return tuple(
        math.nan if count <= few else min(100.0, -10 * math.log10(max(error / count, 1e-10))) for error, count in total
    )  # type: ignore[return-value]


def in_words(values: Mapping[str, float], *, segment_size: int | None) -> tuple[str, ...]:
    """Say how a video moves, and what of it a viewer would complain of, a line each."""
    judged = values.get("judder", math.nan)
    if math.isnan(judged):
        return ("the picture as a whole does not move, or is too short: nothing is said of evenness",)
    names = ((0.3, "moves evenly"), (0.6, "moves as unevenly as a hand-held camera"), (math.inf, "lurches"))
    lines = [f"{next(words for limit, words in names if judged <= limit)} (judder {judged:.2f})"]
    period = TEMPORAL_FACTOR * (segment_size or 0)
    borders = f"every {period} frames, at the borders of segments"
    uncovered = values.get("psnr_persisting", math.nan) - values.get("psnr_uncovered", math.nan)
    lines += [
        words.format(value)
        for value, limit, words in (
            (values["motion_pulse"], JOLT, f"a jolt every {TEMPORAL_FACTOR} frames"),
            (values["motion_pulse_borders"], JOLT, f"a jolt {borders}"),
            (values["first_step"], 1.5, "its first step is {:.1f} times the usual one"),
            (values["backward_steps"], 0.0, "{:.0f}% of its steps go backward"),
            (-values["sharpness_kept"], -0.85, "its sharpness falls from frame 0 to frame 1"),
            (values["sharpness_pulse"], 5.0, f"its sharpness pulses every {TEMPORAL_FACTOR} frames, by {{:.0f}}%"),
            (values["brightness_pulse"], 0.3, f"its brightness pulses every {TEMPORAL_FACTOR} frames"),
            (values["brightness_pulse_borders"], 0.3, f"its brightness pulses {borders}"),
            (values["first_color_offset"], 2.0, "the color of frame 0 is off by {:.1f} levels"),
            (uncovered, 3.0, "what comes into view is {:.1f} dB worse than what was there before"),
        )
        if value > limit  # never of NaN
    ]
    return tuple(lines)
