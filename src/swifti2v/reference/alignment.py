"""Where the first frame of a foreign video lies in the photo that it was made from, and how its colors differ.

Beyond the paper: `refine` takes the motion of any model. Such a video was cropped, scaled and shifted somehow, its
first frame is not the photo, and its exposure may be off. The photo is cut to what the frame shows, so that detail of
the photo lands where it belongs, and the video's colors are brought to the photo's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Floats = NDArray[np.float32]

LEAST_CORRELATION = 0.7
"""Of the aligned photo and the frame, in brightness without its slow changes (a blur of `_SLOW_SIGMA`), which many
pictures share. Below it the photo is taken for another picture's."""

WORKING_SIDE = 480
"""Longer side in pixels at which photo and frame are compared."""

_SLOW_SIGMA = 12.0
_NUM_FEATURES = 2000
_MATCH_RATIO = 0.8
_LEAST_MATCHES = 8
_SCALES = (1.0, 0.94, 0.88, 0.8)
_FINDING = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)


@dataclass(frozen=True)
class Alignment:
    """How a photo and the first frame of a video belong together.

    Args:
        box: left, upper, right and lower edge of what the frame shows, in pixels of the photo (fractions included).
        gain, offset: by channel (red, green, blue): ``gain * frame + offset`` has the photo's colors; of frames in
            [0, 1].
        correlation: see `LEAST_CORRELATION`; in [-1, 1].
        notes: what was found, a sentence each.
    """

    box: tuple[float, float, float, float]
    gain: tuple[float, float, float]
    offset: tuple[float, float, float]
    correlation: float
    notes: tuple[str, ...] = ()

    def recolored(self, frames: Pixels) -> Pixels:
        """Return frames uint8 [..., 3] in the colors of the photo."""
        if self.gain == (1.0, 1.0, 1.0) and self.offset == (0.0, 0.0, 0.0):
            return frames
        levels = np.arange(256, dtype=np.float32)[:, None]
        table = levels * np.array(self.gain, np.float32) + 255 * np.array(self.offset, np.float32)
        looked_up = np.clip(np.rint(table), 0, 255).astype(np.uint8)
        return np.stack([looked_up[frames[..., channel], channel] for channel in range(3)], axis=-1)


def align(photo: Pixels, frame: Pixels) -> Alignment:
    """Find the part of `photo` that `frame` shows, and the difference of their colors.

    Args:
        photo: uint8 [H, W, 3], sRGB.
        frame: uint8 [h, w, 3], the first frame of the video.

    Raises:
        InvalidInputError: the frame does not show this photo, or shows more than the photo holds.
    """
    reduction = min(1.0, WORKING_SIDE / max(frame.shape[:2]))
    small = cv2.resize(frame, None, fx=reduction, fy=reduction, interpolation=cv2.INTER_AREA)
    # The photo is brought to about the scale at which the frame shows it, or its features are not those of the frame.
    height, width = small.shape[:2]
    scale = max(width / photo.shape[1], height / photo.shape[0])
    reduced = cv2.resize(
        photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )
    matrix = _found(_gray(reduced), _gray(small))
    warped = cv2.warpAffine(
        reduced, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    correlation = _correlation(_gray(warped), _gray(small))
    if correlation < LEAST_CORRELATION:
        msg = (
            f"the video's first frame does not show this photo (their correlation is {correlation:.2f}, and at least "
            f"{LEAST_CORRELATION} is needed); give the photo that the video was made from"
        )
        raise InvalidInputError(msg, param="image", value=correlation)
    box = _inside(_edges(matrix, small, photo, reduced), photo)
    gain, offset = _colors(small, warped)
    return Alignment(box, gain, offset, correlation, _notes(photo, frame, box, gain, offset))


def _found(photo: Floats, frame: Floats) -> Floats:
    """Return the affine map from places of the frame to places of the photo with the best correlation."""
    starts = [_centered(photo, frame, scale) for scale in _SCALES]
    matched = _matched(photo, frame)
    if matched is not None:
        starts.insert(0, matched)
    best, best_correlation = starts[0], -1.0
    for start in starts:
        try:
            correlation, matrix = cv2.findTransformECC(frame, photo, start.copy(), cv2.MOTION_AFFINE, _FINDING, None, 5)
        except cv2.error:  # it did not converge from there
            continue
        if correlation > best_correlation and _is_plausible(matrix):
            best, best_correlation = matrix, float(correlation)
        if best_correlation > 0.95:
            break
    return best


def _correlation(photo: Floats, frame: Floats) -> float:
    quick = [(each - cv2.GaussianBlur(each, (0, 0), _SLOW_SIGMA)).ravel() for each in (photo, frame)]
    lengths = [float(np.linalg.norm(each)) for each in quick]
    return float(quick[0] @ quick[1]) / max(lengths[0] * lengths[1], 1e-6)


def _centered(photo: Floats, frame: Floats, scale: float) -> Floats:
    """Return the map of a frame that shows the middle of the photo, `scale` of what would fit."""
    rows, columns = np.array(photo.shape) - scale * np.array(frame.shape)
    return np.array([[scale, 0, columns / 2], [0, scale, rows / 2]], np.float32)


def _matched(photo: Floats, frame: Floats) -> Floats | None:
    """Return the map that most features agree on, or None where too few agree."""
    finder = cv2.SIFT.create(_NUM_FEATURES)
    points, descriptors = zip(
        *(finder.detectAndCompute(each.astype(np.uint8), None) for each in (frame, photo)), strict=True
    )
    if any(each is None or len(each) < 2 for each in descriptors):
        return None
    pairs = cv2.BFMatcher().knnMatch(descriptors[0], descriptors[1], k=2)
    good = [first for first, second in pairs if first.distance < _MATCH_RATIO * second.distance]
    if len(good) < _LEAST_MATCHES:
        return None
    source = np.array([points[0][match.queryIdx].pt for match in good], np.float32)
    target = np.array([points[1][match.trainIdx].pt for match in good], np.float32)
    matrix, agreeing = cv2.estimateAffinePartial2D(source, target, ransacReprojThreshold=2.0)
    if matrix is None or agreeing.sum() < _LEAST_MATCHES:
        return None
    return np.asarray(matrix, dtype=np.float32)


def _is_plausible(matrix: Floats) -> bool:
    """Whether a map is a crop: upright, hardly stretched, and no more than three times enlarged."""
    across, down = matrix[0, 0], matrix[1, 1]
    turned = max(abs(matrix[0, 1]), abs(matrix[1, 0]))
    return bool(0.3 < across < 1.3 and 0.3 < down < 1.3 and turned < 0.03 and abs(across / down - 1) < 0.05)


def _edges(matrix: Floats, frame: Pixels, photo: Pixels, reduced: Pixels) -> tuple[float, ...]:
    """Return the left, upper, right and lower edge of the frame in pixels of the photo."""
    height, width = frame.shape[:2]
    # The map is one of pixel centers: the edges of a picture lie half a pixel beyond the first and the last.
    middles = np.array(
        [
            (-0.5, height / 2 - 0.5),
            (width / 2 - 0.5, -0.5),
            (width - 0.5, height / 2 - 0.5),
            (width / 2 - 0.5, height - 0.5),
        ]
    )
    places = middles @ matrix[:, :2].T + matrix[:, 2] + 0.5
    places *= np.array([photo.shape[1] / reduced.shape[1], photo.shape[0] / reduced.shape[0]])
    return tuple(float(places[index, index % 2]) for index in range(4))


def _inside(edges: tuple[float, ...], photo: Pixels) -> tuple[float, float, float, float]:
    """Return the edges, moved into the photo where they lie less than 2% outside."""
    height, width = photo.shape[:2]
    left, upper, right, lower = edges
    outside = max(-left / width, -upper / height, right / width - 1, lower / height - 1)
    if outside > 0.02:
        msg = (
            f"the video shows {outside:.0%} more than the photo holds at an edge; give the whole photo that the video "
            "was made from"
        )
        raise InvalidInputError(msg, param="image", value=outside)
    return max(left, 0.0), max(upper, 0.0), min(right, float(width)), min(lower, float(height))


def _colors(frame: Pixels, photo: Pixels) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return gain and offset by channel that bring `frame` to `photo`, by least squares over well aligned places."""
    low, high = (cv2.GaussianBlur(each.astype(np.float32) / 255, (0, 0), 3) for each in (frame, photo))
    difference = np.abs(low - high).max(axis=2)
    trusted = difference <= np.quantile(difference, 0.8)
    gains, offsets = [], []
    for channel in range(3):
        x, y = low[..., channel][trusted], high[..., channel][trusted]
        deviation = float(x.std())
        gain = float(np.clip(np.cov(x, y)[0, 1] / deviation**2, 0.8, 1.25)) if deviation > 0.02 else 1.0
        gains.append(round(gain, 4))
        offsets.append(round(float(y.mean() - gain * x.mean()), 4))
    if (
        max(abs(g * 0.5 + o - 0.5) for g, o in zip(gains, offsets, strict=True)) < 0.004
        and max(abs(g - 1) for g in gains) < 0.01
    ):
        return (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    return (gains[0], gains[1], gains[2]), (offsets[0], offsets[1], offsets[2])


def _notes(
    photo: Pixels,
    frame: Pixels,
    box: tuple[float, float, float, float],
    gain: tuple[float, float, float],
    offset: tuple[float, float, float],
) -> tuple[str, ...]:
    height, width = photo.shape[:2]
    notes = []
    left, upper, right, lower = box
    kept = (right - left) * (lower - upper) / (width * height)
    if kept < 0.985:
        notes.append(
            f"the video shows {kept:.0%} of the photo: from ({left:.0f}, {upper:.0f}) to ({right:.0f}, {lower:.0f})"
        )
    if gain != (1.0, 1.0, 1.0):
        changes = ", ".join(
            f"{name} {100 * (g * 0.5 + o - 0.5):+.1f}%"
            for name, g, o in zip(("red", "green", "blue"), gain, offset, strict=True)
        )
        notes.append(f"the video's colors were brought to the photo's: {changes} at middle gray")
    enlargement = min((right - left) / frame.shape[1], (lower - upper) / frame.shape[0])
    if enlargement < 1.2:
        notes.append("the photo holds hardly more pixels than the video, so there is little detail to bring")
    return tuple(notes)


def _gray(pixels: Pixels) -> Floats:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.float32)
