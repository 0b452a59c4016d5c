"""What lies beyond the borders of a picture: continued once per clip from patches of the picture itself.

A camera that pans or pulls back uncovers what no photograph shows. A mirror is a kaleidoscope, and a network this small
would paint mud. So the picture is continued as image completion does it (Wexler et al., "Space-Time Completion of
Video", PAMI 2007; Barnes et al., "PatchMatch", 2009): from the border outward on a very small picture, then finer and
finer, every patch beyond the border like some patch of the picture, and best one of the same height, for the sky goes
on as sky and the ground as ground. All frames are then sampled from this one canvas, so that what is
uncovered stands still with the scene.

The result is kept as places to copy from, so that a canvas of any size can be made from a larger picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]

PATCH = 7
_HALF = PATCH // 2
WORK_AREA = 320 * 176
"""Pixels of the picture, about, at which places are found."""
_COARSEST = 20  # pixels of the shorter side
_COMPONENTS = 24
_HEIGHT_LIKING = 25.0
_BRUTE_PAIRS = 1.5e8
_COHERENCE = 2.0
_AROUND = [(down, along) for down in (-1, 0, 1) for along in (-1, 0, 1) if (down, along) != (0, 0)]


class Margins(NamedTuple):
    """How far a canvas reaches beyond the picture, in widths of the picture."""

    left: float = 0.0
    top: float = 0.0
    right: float = 0.0
    bottom: float = 0.0


@dataclass(frozen=True)
class Canvas:
    """A picture continued beyond its borders.

    Args:
        places: [Hc,Wc,2] float32: x and y, in pixels of the working picture, that each place of the canvas is copied
            from; within the picture its own.
        left, top: pixels of the canvas before the picture.
        width, height: of the working picture.
    """

    places: FloatArray
    left: int
    top: int
    width: int
    height: int

    def painted(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float, float]:
        """Return the canvas of a picture [H,W,3] of any size, and where the picture's corner lies in it (x, y pixels).

        Where patches from different places meet they are blended.
        """
        height, width = picture.shape[:2]
        scale_x, scale_y = width / self.width, height / self.height
        rows, columns = self.places.shape[:2]
        full = (round(columns * scale_x), round(rows * scale_y))
        left, top = self.left * scale_x, self.top * scale_y
        x = (np.arange(full[0], dtype=np.float32) + 0.5) / np.float32(scale_x) - 0.5
        y = (np.arange(full[1], dtype=np.float32) + 0.5) / np.float32(scale_y) - 0.5
        near_x, near_y = np.rint(x).astype(int), np.rint(y).astype(int)
        total = np.zeros((full[1], full[0], 3), np.float32)
        weights = 0.0
        for down, along, weight in _VOTES:
            at_x, at_y = np.clip(near_x + along, 0, columns - 1), np.clip(near_y + down, 0, rows - 1)
            places = self.places[at_y[:, None], at_x[None, :]]
            place_x = ((places[..., 0] + (x - at_x)[None, :] + 0.5) * scale_x - 0.5).astype(np.float32)
            place_y = ((places[..., 1] + (y - at_y)[:, None] + 0.5) * scale_y - 0.5).astype(np.float32)
            total += weight * cv2.remap(picture, place_x, place_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            weights += weight
        total /= weights
        corner_x, corner_y = round(left), round(top)
        self._correct_tone(total, picture)
        painted = np.clip(np.rint(total), 0, 255).astype(np.uint8)
        painted[corner_y : corner_y + height, corner_x : corner_x + width] = picture
        return painted, float(corner_x), float(corner_y)

    def _correct_tone(
        self,
        painted: FloatArray,
        picture: NDArray[np.uint8],
    ) -> None:
        """Shift the colors beyond the borders so that they meet the picture's there; the shift fades with distance."""
        small = cv2.resize(picture, (self.width, self.height), interpolation=cv2.INTER_AREA).astype(np.float32)
        rows, columns = self.places.shape[:2]
        shift = np.zeros((rows, columns, 3), np.float32)
        weight = np.zeros((rows, columns), np.float32)
        right, bottom = self.left + self.width, self.top + self.height
        for along in range(max(0, self.left), right):
            for outside, down in ((self.top - 1, 1), (bottom, -1)):
                if 0 <= outside < rows:
                    self._meet(small, shift, weight, (outside, along), (down, 0))
        for down in range(max(0, self.top), bottom):
            for outside, along in ((self.left - 1, 1), (right, -1)):
                if 0 <= outside < columns:
                    self._meet(small, shift, weight, (down, outside), (0, along))
        if not weight.any():
            return
        total, sums = np.zeros_like(shift), np.zeros_like(weight)
        for sigma, importance in _TONE_SCALES:
            total += importance * cv2.GaussianBlur(shift, (0, 0), sigma)
            sums += importance * cv2.GaussianBlur(weight, (0, 0), sigma)
        inside = _inside(self.width, self.height, self.left, self.top, weight.shape)
        distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 5)
        fade = np.exp(-((distance / _TONE_REACH) ** 2))
        shifts = np.clip(total / np.maximum(sums, 1e-9)[..., None], -_TONE_MOST, _TONE_MOST) * fade[..., None]
        shifts[inside] = 0
        painted += cv2.resize(shifts, painted.shape[1::-1], interpolation=cv2.INTER_LINEAR)

    def _meet(
        self,
        small: FloatArray,
        shift: FloatArray,
        weight: FloatArray,
        at: tuple[int, int],
        inward: tuple[int, int],
    ) -> None:
        """Note how the picture at its border differs from what the place beside it would go on with there."""
        x, y = self.places[at]
        x, y = int(np.clip(x + inward[1], 0, self.width - 1)), int(np.clip(y + inward[0], 0, self.height - 1))
        own_x, own_y = at[1] + inward[1] - self.left, at[0] + inward[0] - self.top
        shift[at] = small[own_y, own_x] - small[y, x]
        weight[at] = 1


_TONE_SCALES = ((2.0, 1.0), (6.0, 1e-2), (20.0, 1e-4), (60.0, 1e-6))
_TONE_REACH = 40.0
_TONE_MOST = 60.0
_VOTES = [(0, 0, 4.0), *[(down, along, 1.0) for down in (-2, 0, 2) for along in (-2, 0, 2) if (down, along) != (0, 0)]]


def continued(picture: NDArray[np.uint8], margins: Margins) -> Canvas:
    """Continue a picture uint8 [H,W,3] by margins."""
    height, width = picture.shape[:2]
    scale = min(1.0, (WORK_AREA / (width * height)) ** 0.5)
    width, height = max(32, round(width * scale)), max(32, round(height * scale))
    left, top, right, bottom = (int(np.ceil(margin * width)) for margin in margins)
    if max(left, top, right, bottom) == 0:
        return Canvas(_own_places(width, height, 0, 0, (height, width)), 0, 0, width, height)
    unit = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    levels = [1.0]
    while min(width, height) * levels[-1] / 2 >= _COARSEST:
        levels.append(levels[-1] / 2)
    places: FloatArray | None = None
    for level in reversed(levels):
        places = _level(unit, level, (left, top, right, bottom), places)
    if places is None:
        raise AssertionError
    own = _own_places(width, height, left, top, (height + top + bottom, width + left + right))
    inside = _inside(width, height, left, top, own.shape[:2])
    return Canvas(np.where(inside[..., None], own, places), left, top, width, height)


def _level(
    unit: FloatArray, level: float, margins: tuple[int, int, int, int], coarser: FloatArray | None
) -> FloatArray:
    """Return the places of one level of the pyramid, in its own pixels, from those of the level before."""
    height, width = (max(PATCH + 2, round(side * level)) for side in unit.shape[:2])
    picture = cv2.resize(unit, (width, height), interpolation=cv2.INTER_AREA)
    left, top, right, bottom = (int(np.ceil(margin * level)) if margin else 0 for margin in margins)
    shape = (height + top + bottom, width + left + right)
    own = _own_places(width, height, left, top, shape)
    inside = _inside(width, height, left, top, shape)
    search = _Search(picture, own)
    if coarser is None:
        places = _grown(search, picture, inside, left, top)
    else:
        places = cv2.resize(coarser, shape[::-1], interpolation=cv2.INTER_NEAREST)
        ratio = np.array([shape[1] / coarser.shape[1], shape[0] / coarser.shape[0]], np.float32)
        rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
        near_x = np.clip(np.floor((columns + 0.5) / ratio[0]), 0, coarser.shape[1] - 1)
        near_y = np.clip(np.floor((rows + 0.5) / ratio[1]), 0, coarser.shape[0] - 1)
        within = np.stack(
            [columns - ((near_x + 0.5) * ratio[0] - 0.5), rows - ((near_y + 0.5) * ratio[1] - 0.5)], axis=-1
        )
        places = np.rint((places + 0.5) * ratio - 0.5 + within)
    # Patches that hold something unknown are looked for; all of them speak for the pixels they cover.
    unknown = cv2.dilate((~inside).astype(np.uint8), np.ones((PATCH, PATCH), np.uint8)) > 0
    canvas = _voted(picture, places, inside, own)
    iterations = 4 if coarser is None else 3 if level < 1 else 2
    for _ in range(iterations):
        places = search.nearest(canvas, places, unknown)
        canvas = _voted(picture, places, inside, own)
    return np.asarray(places, dtype=np.float32)


class _Search:
    """Finds for patches of a canvas the most similar patches of a picture."""

    def __init__(self, picture: FloatArray, own: FloatArray) -> None:
        self.height, self.width = picture.shape[:2]
        patches = _patches(picture)[_HALF : self.height - _HALF, _HALF : self.width - _HALF]
        self.rows, self.columns = patches.shape[:2]
        flat = patches.reshape(-1, patches.shape[-1])
        self.mean = flat.mean(axis=0)
        sampled = flat[:: max(1, len(flat) // 4000)] - self.mean
        _values, vectors = np.linalg.eigh(sampled.T @ sampled)
        self.basis = np.ascontiguousarray(vectors[:, ::-1][:, :_COMPONENTS])
        y = np.repeat(np.arange(_HALF, self.height - _HALF), self.columns)
        self.described = self._with_height((flat - self.mean) @ self.basis, y)
        # Above and below, a liking for the outermost rows would repeat them: farther out, farther in.
        last = self.height - 1
        y = own[..., 1]
        reflected = np.where(y < 0, -y, np.where(y > last, 2 * last - y, y))
        self.own_y = np.clip(reflected, _HALF, last - _HALF)

    def _with_height(self, values: FloatArray, y: FloatArray) -> FloatArray:
        liking = (_HEIGHT_LIKING / self.height) * np.asarray(y, np.float32)
        return np.concatenate([values, liking[:, None]], axis=1).astype(np.float32)

    def describe(self, canvas: FloatArray, wanted: NDArray[np.bool_]) -> FloatArray:
        values = (_patches(canvas)[wanted] - self.mean) @ self.basis
        return self._with_height(values, self.own_y[wanted])

    def nearest(self, canvas: FloatArray, places: FloatArray, wanted: NDArray[np.bool_]) -> FloatArray:
        """Return `places` with those that are `wanted` found anew, in whole pixels."""
        described = self.describe(canvas, wanted)
        found = places.copy()
        if len(described) * len(self.described) <= _BRUTE_PAIRS:
            found[wanted] = self._all(described)
        else:
            found = self._around(described, places, wanted)
        return found

    def _all(self, described: FloatArray) -> FloatArray:
        squares = (self.described**2).sum(axis=1)
        best = np.empty(len(described), np.int64)
        chunk = max(1, int(2e7 // len(self.described)))
        for first in range(0, len(described), chunk):
            part = described[first : first + chunk]
            best[first : first + chunk] = (squares[None] - 2 * part @ self.described.T).argmin(axis=1)
        return np.stack([best % self.columns + _HALF, best // self.columns + _HALF], axis=-1).astype(np.float32)

    def _around(self, described: FloatArray, places: FloatArray, wanted: NDArray[np.bool_]) -> FloatArray:
        """Try what the neighbors have, moved along, and places near by, at random (PatchMatch, all pixels at once)."""
        rng = np.random.default_rng(0)
        rows, columns = np.nonzero(wanted)
        field = places.copy()
        distance = self._distance(described, field[rows, columns])
        steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
        for reach in (4, 2, 1, 1):
            for down, along in steps:
                at_y = np.clip(rows + down * reach, 0, wanted.shape[0] - 1)
                at_x = np.clip(columns + along * reach, 0, wanted.shape[1] - 1)
                moved = field[at_y, at_x] + np.stack([columns - at_x, rows - at_y], axis=-1)
                distance = self._try(described, field, (rows, columns), moved, distance)
            jump = rng.integers(-reach, reach + 1, size=(len(rows), 2))
            distance = self._try(described, field, (rows, columns), field[rows, columns] + jump, distance)
        return field

    def _try(
        self,
        described: FloatArray,
        field: FloatArray,
        at: tuple[NDArray[np.int64], NDArray[np.int64]],
        candidates: FloatArray,
        distance: FloatArray,
    ) -> FloatArray:
        other = self._distance(described, candidates)
        better = other < distance
        field[at[0][better], at[1][better]] = self._clipped(candidates[better])
        return np.where(better, other, distance)

    def _clipped(self, places: FloatArray) -> FloatArray:
        x = np.clip(places[:, 0], _HALF, self.width - _HALF - 1)
        y = np.clip(places[:, 1], _HALF, self.height - _HALF - 1)
        return np.stack([x, y], axis=-1).astype(np.float32)

    def _distance(self, described: FloatArray, places: FloatArray) -> FloatArray:
        clipped = self._clipped(places).astype(np.int64) - _HALF
        difference = described - self.described[clipped[:, 1] * self.columns + clipped[:, 0]]
        return np.asarray(np.einsum("nc,nc->n", difference, difference))


def _grown(search: _Search, picture: FloatArray, inside: NDArray[np.bool_], left: int, top: int) -> FloatArray:
    """Continue a very small picture ring by ring: each pixel from the patch that fits best what is known around it."""
    shape = inside.shape
    height, width = picture.shape[:2]
    padded = _HALF
    canvas = np.zeros((shape[0] + 2 * padded, shape[1] + 2 * padded, 3), np.float32)
    known = np.zeros(canvas.shape[:2], bool)
    canvas[padded + top : padded + top + height, padded + left : padded + left + width] = picture
    known[padded + top : padded + top + height, padded + left : padded + left + width] = True
    sources = _patches(picture)[_HALF : height - _HALF, _HALF : width - _HALF].reshape(-1, PATCH * PATCH, 3)
    source_y = np.repeat(np.arange(_HALF, height - _HALF), search.columns)
    places = np.zeros((*shape, 2), np.float32)
    missing = ~inside
    while missing.any():
        inner = known[padded : padded + shape[0], padded : padded + shape[1]].astype(np.uint8)
        ring = missing & (cv2.dilate(inner, np.ones((3, 3), np.uint8)) > 0)
        ring_known, ring_canvas = known.copy(), canvas.copy()
        for row, column in zip(*np.nonzero(ring), strict=True):
            seen = ring_known[row : row + PATCH, column : column + PATCH].reshape(-1)
            target = ring_canvas[row : row + PATCH, column : column + PATCH].reshape(-1, 3)
            difference = ((sources[:, seen] - target[seen]) ** 2).sum(axis=(1, 2)) * (PATCH**2 / max(seen.sum(), 1))
            liking = (_HEIGHT_LIKING / height * (source_y - search.own_y[row, column])) ** 2
            total = difference + liking
            coherent, chosen = float("inf"), -1
            best = int(total.argmin())
            # What goes on from a neighbor is preferred unless something fits much better: large pieces, not crumbs.
            for down, along in _AROUND:
                at_y, at_x = row + down, column + along
                if not (0 <= at_y < shape[0] and 0 <= at_x < shape[1]) or not ring_known[at_y + padded, at_x + padded]:
                    continue
                if inside[at_y, at_x]:
                    continue
                x, y = places[at_y, at_x].astype(int) - (along, down) - _HALF
                if 0 <= x < search.columns and 0 <= y < search.rows:
                    other = int(y) * search.columns + int(x)
                    if total[other] <= total[best] * _COHERENCE + 1e-3 and total[other] < coherent:
                        coherent, chosen = float(total[other]), other
            best = best if chosen < 0 else chosen
            places[row, column] = best % search.columns + _HALF, best // search.columns + _HALF
            x, y = places[row, column].astype(int)
            canvas[row + padded, column + padded] = picture[y, x]
            known[row + padded, column + padded] = True
        missing &= ~ring
    own = _own_places(width, height, left, top, shape)
    return np.where(inside[..., None], own, places)


def _voted(picture: FloatArray, places: FloatArray, inside: NDArray[np.bool_], own: FloatArray) -> FloatArray:
    """Return the canvas that `places` speak for: every pixel the mean of what the patches over it say."""
    rows, columns = places.shape[:2]
    total = np.zeros((rows, columns, 3), np.float32)
    weights = np.zeros((rows, columns, 1), np.float32)
    height, width = picture.shape[:2]
    for down in range(-_HALF, _HALF + 1, 1):
        for along in range(-_HALF, _HALF + 1, 1):
            weight = np.float32(np.exp(-(down**2 + along**2) / 6))
            to = (slice(max(0, -down), rows - max(0, down)), slice(max(0, -along), columns - max(0, along)))
            of = (slice(max(0, down), rows - max(0, -down)), slice(max(0, along), columns - max(0, -along)))
            x = np.clip(places[of][..., 0] - along, 0, width - 1).astype(np.int64)
            y = np.clip(places[of][..., 1] - down, 0, height - 1).astype(np.int64)
            total[to] += weight * picture[y, x]
            weights[to] += weight
    canvas = total / weights
    x = np.clip(own[..., 0], 0, width - 1).astype(np.int64)
    y = np.clip(own[..., 1], 0, height - 1).astype(np.int64)
    return np.where(inside[..., None], picture[y, x], canvas).astype(np.float32)


def _patches(picture: FloatArray) -> FloatArray:
    """Return the patch around every pixel, [H,W,147]; beyond the borders the picture goes on as at them."""
    padded = cv2.copyMakeBorder(picture, _HALF, _HALF, _HALF, _HALF, cv2.BORDER_REPLICATE)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH), axis=(0, 1))
    return np.ascontiguousarray(windows.transpose(0, 1, 3, 4, 2)).reshape(*picture.shape[:2], -1)


def _own_places(width: int, height: int, left: int, top: int, shape: tuple[int, ...]) -> FloatArray:
    del width, height
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return np.stack([columns - left, rows - top], axis=-1).astype(np.float32)


def _inside(width: int, height: int, left: int, top: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    inside = np.zeros(shape[:2], bool)
    inside[top : top + height, left : left + width] = True
    return inside
