"""What `light` sees of a frame: aligned pictures and the evidence of how well they align. No weights.

Everything here comes from the motion reference and the image alone, so frames may be prepared ahead, in threads, and
again after a run was resumed: nothing is carried from frame to frame but the motion frames themselves.

The work grid is a quarter of the output (H/4 x W/4). Motion frames of any size are brought to the output (the base) and
to the work grid; at a reduction of four the latter is the motion frame itself.

What is done for a frame t:

1. flows to its two neighbors (DIS);
2. steadying: texture that trembles about its own path is put back on that path (`swim_correction`);
3. flow to frame 0, the image's detail warped along it as in `reference.transport`, confidence;
4. evidence at the work grid: by what the warped frame 0, the warped reduced image and the warped neighbors differ from
   the frame, errors of the flows, and the slow difference in color from the image where the flow explains the frame.

Shapes: H, W output; h, w work grid; h', w' motion reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch

from swifti2v.reference.flow import CorrespondenceEstimator, dense_flow
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.resample import enlarge, upsample, warp
from swifti2v.reference.workers import ahead

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

Array = np.ndarray[Any, Any]

GRID = 4
"""Output pixels per pixel of the work grid, each way."""
EVIDENCE_CHANNELS = 19
NEIGHBOR_SCALE = 1
"""Size of the pictures between which the flow to the neighbors is found, over the work grid's."""
REACH = 2
"""Frames before and after that a frame's swim is judged by."""
# Lower quartiles of the corrections' lengths (grid pixels) up to which a frame is left as it is, and from which it is
# steadied in full: limbs and cloth move unevenly too, but never everywhere.
STEADY_FROM, STEADY_FULL = 0.11, 0.16
# Where frame 0 lies on the image to within this (grid pixels), nobody made the motion reference up, and what trembles
# may well have done so before the camera: both are raised by this factor.
EXACT_FIRST, EXACT_DOUBT = 0.06, 1.7
MOST_CORRECTION = 1.5
CORRECTION_SIGMA = 2.0
COLOR_SIGMA = 10.0
# Round trips of flows longer than this (grid pixels) are not believed.
ROUND_TRIP = 0.7


class Prepared(NamedTuple):
    """One frame, all but the recurrent inputs. Values of pictures are in [-1, 1].

    Args:
        base: [3, H, W], the motion frame enlarged (and steadied).
        detail: [3, H, W], what transport adds at full confidence.
        evidence: [EVIDENCE_CHANNELS, h, w] in [-0.5, 0.5]; the first is half of transport's confidence.
        flow: [2, h, w], to the frame before, in pixels of the work grid, x first.
    """

    base: Tensor
    detail: Tensor
    evidence: Tensor
    flow: Tensor


@dataclass
class Frame:
    """A motion frame and what becomes known of it.

    Args:
        index: in the motion reference.
        pixels: uint8 [h', w', 3], as given.
        grid: float32 [h, w, 3] in [-1, 1], on the work grid; steadied once `correction` is known.
        gray: uint8, `NEIGHBOR_SCALE` times the work grid.
        backward: [h, w, 2], flow to the frame before in grid pixels.
        forward: [h, w, 2], flow to the next frame.
        correction: [h, w, 2], by how much what is seen at a place is to be moved; None for not at all.
    """

    index: int
    pixels: Array
    grid: Array
    gray: Array
    backward: Array | None = None
    forward: Array | None = None
    correction: Array | None = None

    @property
    def to_previous(self) -> Array:
        """`backward`, of a frame that has one before it."""
        return _known(self.backward)

    @property
    def to_next(self) -> Array:
        """`forward`, of a frame whose next one was read."""
        return _known(self.forward)


class Job(NamedTuple):
    """A frame between its neighbors; jobs are independent of each other."""

    before: Frame
    frame: Frame
    after: Frame | None


class Preparer:
    """Prepares the frames 1, 2, ... of a motion reference: ``preparer(job)`` for each of ``preparer.jobs(motion)``.

    Args:
        image: [3, H, W] float32 in [-1, 1] on the device where the work is to be done; H and W multiples of 8.
        options: of the transport.
        steady: take swim away.
    """

    def __init__(self, image: Tensor, *, options: ReferenceOptions | None = None, steady: bool = True) -> None:
        self.image = image
        self.options = options or ReferenceOptions()
        self.steady = steady
        self.height, self.width = image.shape[-2:]
        self.grid_height, self.grid_width = self.height // GRID, self.width // GRID
        self.reduced = _resized(image.permute(1, 2, 0).cpu().numpy(), self.grid_height, self.grid_width)
        # Of frame 0, once that is read.
        self.estimate: CorrespondenceEstimator
        self.detail: Tensor
        self.first_grid: Array
        self.doubt = 1.0

    def jobs(self, motion: Iterable[Array], *, workers: int = 1) -> Iterator[Job]:
        """Yield frame by frame, `REACH` + `workers` + 2 frames behind what was read of `motion`.

        Args:
            motion: uint8 [h', w', 3] each.
            workers: frames whose flows are found at once.
        """
        before: Frame | None = None
        frame: Frame | None = None
        for after in self._steadied(self._linked(motion, workers)):
            if before is not None and frame is not None:
                yield Job(before, frame, after)
            before, frame = frame, after
        if before is not None and frame is not None:
            yield Job(before, frame, None)

    def __call__(self, job: Job) -> Prepared:
        """Prepare one frame."""
        frame, device = job.frame, self.image.device
        found, correction = self.estimate(frame.pixels), frame.correction
        flow_to_first = self._on_grid(found.flow) * np.array((self.grid_width, self.grid_height), dtype=np.float32)
        confidence = self._on_grid(found.confidence)
        unit = _unit(frame.pixels)
        base = upsample(unit, self.height, self.width, device=device)
        kept = self._kept(unit)
        if correction is not None:
            flow_to_first = _moved(flow_to_first, -correction) - correction
            confidence = _moved(confidence, -correction)
            back = enlarge(-correction * GRID, self.height, self.width, device=device)
            base, kept = warped(base, back), warped(kept, back)
        detail = warped(self.detail, enlarge(flow_to_first * GRID, self.height, self.width, device=device))
        detail.add_(kept).sub_(base)
        to_before, before_error = _between(frame, job.before)
        before = _moved(job.before.grid, to_before) - frame.grid
        after, after_error = np.zeros_like(frame.grid), np.full_like(confidence, 0.5)
        if job.after is not None:
            to_after, after_error = _between(frame, job.after)
            after = _moved(job.after.grid, to_after) - frame.grid
        from_image = _moved(self.reduced, flow_to_first) - frame.grid
        amount = np.zeros_like(confidence) if correction is None else np.hypot(correction[..., 0], correction[..., 1])
        evidence = np.dstack((
            confidence / 2, before_error, after_error, _moved(self.first_grid, flow_to_first) - frame.grid, from_image,
            before, after, _slow(from_image, confidence), amount / 2,
        )).clip(-0.5, 0.5)  # fmt: skip
        return Prepared(base, detail, _tensor(evidence, device), _tensor(to_before, device))

    def _linked(self, motion: Iterable[Array], workers: int) -> Iterator[Frame]:
        """Read frames and find the flows between neighbors, as many at once as there are workers."""

        def read() -> Iterator[tuple[Frame | None, Frame]]:
            before: Frame | None = None
            for index, pixels in enumerate(motion):
                grid = _resized(_unit(pixels), self.grid_height, self.grid_width)
                frame = Frame(index, pixels, grid, self._gray(pixels))
                if before is None:
                    self._begin(frame)
                yield before, frame
                before = frame

        return ahead(self._link, read(), workers)

    def _link(self, pair: tuple[Frame | None, Frame]) -> Frame:
        before, frame = pair
        if before is not None:
            before.forward = self._flow(before.gray, frame.gray)
            frame.backward = self._flow(frame.gray, before.gray)
        return frame

    def _begin(self, frame: Frame) -> None:
        """Take frame 0: put it on the image if it swims, and find the detail that the image has beyond it."""
        if self.steady:
            image_gray = self._gray(np.rint((self.image.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).astype(np.uint8))
            trust = np.ones((self.grid_height, self.grid_width), dtype=np.float32)
            frame.correction, level = _believed(self._flow(frame.gray, image_gray), trust)
            self.doubt = EXACT_DOUBT if level < EXACT_FIRST else 1.0
        first = frame.pixels
        if frame.correction is not None:
            frame.grid = _moved(frame.grid, -frame.correction)
            height, width = first.shape[:2]
            scale = np.array((width / self.grid_width, height / self.grid_height), dtype=np.float32)
            shift = np.asarray(cv2.resize(frame.correction, (width, height))) * scale
            first = _moved(first, -shift)
        self.first_grid = frame.grid
        self.estimate = CorrespondenceEstimator(first, self.height, self.width, options=self.options)
        self.detail = self.image - self._kept(_unit(first))

    def _steadied(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Find the corrections, `REACH` frames behind."""
        window: dict[int, Frame] = {}
        newest = -1
        for frame in frames:
            newest = frame.index
            window[newest] = frame
            if newest >= REACH:
                yield self._corrected(newest - REACH, window)
            window.pop(newest - 2 * REACH, None)
        for index in range(max(newest - REACH + 1, 0), newest + 1):
            yield self._corrected(index, window)

    def _corrected(self, index: int, window: dict[int, Frame]) -> Frame:
        frame = window[index]
        if self.steady and index > 0:
            frame.correction = swim_correction(index, window, doubt=self.doubt)
            if frame.correction is not None:
                frame.grid = _moved(frame.grid, -frame.correction)
        return frame

    def _gray(self, pixels: Array) -> Array:
        size = (self.grid_width * NEIGHBOR_SCALE, self.grid_height * NEIGHBOR_SCALE)
        gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        enlarges = size[0] > gray.shape[1]
        return np.asarray(cv2.resize(gray, size, interpolation=cv2.INTER_CUBIC if enlarges else cv2.INTER_AREA))

    def _flow(self, source: Array, target: Array) -> Array:
        return self._on_grid(dense_flow(source, target)) / NEIGHBOR_SCALE

    def _on_grid(self, values: Array) -> Array:
        size = (self.grid_width, self.grid_height)
        return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA))

    def _kept(self, unit: Array) -> Tensor:
        if self.options.band_sigma > 0:
            unit = np.asarray(cv2.GaussianBlur(unit, (0, 0), self.options.band_sigma))
        return upsample(unit, self.height, self.width, device=self.image.device)


def warped(picture: Tensor, flow: Tensor) -> Tensor:
    """Return what `reference.resample.warp` does; on the CPU by OpenCV, which takes a quarter of the time.

    Args:
        picture: [3, H, W].
        flow: [2, H, W] in pixels.
    """
    if picture.device.type != "cpu":
        return warp(picture, flow)
    height, width = picture.shape[-2:]
    x = flow[0].numpy() + np.arange(width, dtype=np.float32)
    y = flow[1].numpy() + np.arange(height, dtype=np.float32)[:, None]
    pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
    moved = cv2.remap(pixels, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return torch.from_numpy(moved).permute(2, 0, 1)


def swim_correction(index: int, window: dict[int, Frame], *, doubt: float = 1.0) -> Array | None:
    """Return by how much what a frame shows is to be moved to lie on its own smooth path: [h, w, 2], or None.

    Along an even path the displacements to the frames t + k and t - k cancel; what is left of their mean is how far
    the frame is from where its neighbors put it. The part of it that a shaking camera makes (an affine field) is kept.

    Args:
        index: of the frame, t.
        window: the frames at least from t - `REACH` to t + `REACH`, as far as there are such, flows known.
        doubt: factor of the lengths that are taken for unevenness of the motion itself.
    """
    frame = window[index]
    total = np.zeros((*frame.grid.shape[:2], 2), dtype=np.float32)
    trust = np.ones(frame.grid.shape[:2], dtype=np.float32)
    pairs = 0
    forward, backward = np.zeros_like(total), np.zeros_like(total)
    for step in range(1, REACH + 1):
        later, earlier = window.get(index + step), window.get(index - step)
        if later is None or earlier is None:
            break
        link, link_back = window[index + step - 1].to_next, window[index - step + 1].to_previous
        trust *= _moved(_round_trip(link, later.to_previous), forward) < ROUND_TRIP
        trust *= _moved(_round_trip(link_back, earlier.to_next), backward) < ROUND_TRIP
        forward, backward = forward + _moved(link, forward), backward + _moved(link_back, backward)
        total += forward + backward
        pairs += 1
    if not pairs:
        return None
    return _believed(total / (2 * pairs + 1), trust, doubt=doubt)[0]


def _believed(raw: Array, trust: Array, *, doubt: float = 1.0) -> tuple[Array | None, float]:
    """Return a field of corrections less its affine part, smoothed and bounded, and the quartile of its lengths.

    The field is None if it is no more than noise.
    """
    known = trust > 0
    if known.mean() < 0.1:
        return None, 0.0
    height, width = trust.shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack((np.ones_like(rows), columns, rows), axis=-1)
    pick = known & (np.hypot(raw[..., 0], raw[..., 1]) < MOST_CORRECTION)
    if pick.sum() < 64:
        return None, 0.0
    fitted, *_ = np.linalg.lstsq(terms[pick][::7], raw[pick][::7], rcond=None)
    field = raw - terms @ fitted.astype(np.float32)
    length = np.hypot(field[..., 0], field[..., 1])
    level = float(np.percentile(length[known], 25))
    gain = min(max((level / doubt - STEADY_FROM) / (STEADY_FULL - STEADY_FROM), 0.0), 1.0)
    if gain == 0:
        return None, level
    weight = trust * np.clip(2 - length / MOST_CORRECTION, 0, 1)
    blurred = np.asarray(cv2.GaussianBlur(np.dstack((field * weight[..., None], weight)), (0, 0), CORRECTION_SIGMA))
    return np.asarray(gain * blurred[..., :2] / (blurred[..., 2:] + 0.1), dtype=np.float32), level


def _between(frame: Frame, other: Frame) -> tuple[Array, Array]:
    """Return the flow from a steadied frame to a steadied neighbor and the error of its round trip [h, w]."""
    is_previous = other.index < frame.index
    flow, back = (frame.to_previous, other.to_next) if is_previous else (frame.to_next, other.to_previous)
    error = _round_trip(flow, back) / 4
    if frame.correction is not None:
        flow = _moved(flow, -frame.correction) - frame.correction
    if other.correction is not None:
        flow = flow + _moved(other.correction, flow)
    return flow, error


def _known(flow: Array | None) -> Array:
    if flow is None:
        msg = "a frame of the motion reference was used before its neighbor was read"
        raise RuntimeError(msg)
    return flow


def _round_trip(flow: Array, back: Array) -> Array:
    ended = flow + _moved(back, flow)
    return np.asarray(np.hypot(ended[..., 0], ended[..., 1]))


def _moved(values: Array, shift: Array) -> Array:
    """Return ``values(x + shift(x))``, bicubic; beyond the borders values are mirrored."""
    height, width = shift.shape[:2]
    x = shift[..., 0] + np.arange(width, dtype=np.float32)
    y = shift[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    kernel = cv2.INTER_LINEAR if values.ndim == 2 or values.shape[-1] == 2 else cv2.INTER_CUBIC
    return np.asarray(cv2.remap(values, x, y, kernel, borderMode=cv2.BORDER_REFLECT))


def _slow(difference: Array, confidence: Array) -> Array:
    """Return the mean difference around each place, over what is trusted: [h, w, 3]."""
    height, width = confidence.shape
    small = (max(width // 4, 1), max(height // 4, 1))
    trusted = np.dstack((difference * confidence[..., None], confidence))
    reduced = cv2.GaussianBlur(
        np.asarray(cv2.resize(trusted, small, interpolation=cv2.INTER_AREA)), (0, 0), COLOR_SIGMA
    )
    return np.asarray(cv2.resize(reduced[..., :3] / (reduced[..., 3:] + 0.02), (width, height)))


def _unit(pixels: Array) -> Array:
    return np.asarray(pixels, dtype=np.float32) / np.float32(127.5) - 1


def _resized(picture: Array, height: int, width: int) -> Array:
    if picture.shape[:2] == (height, width):
        return picture
    reduces = width < picture.shape[1]
    return np.asarray(
        cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if reduces else cv2.INTER_CUBIC)
    )


def _tensor(values: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)).to(device)
