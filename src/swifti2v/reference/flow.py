"""Where each place of a motion reference's frame came from in its first frame, and how far that can be trusted.

Optical flow by DIS (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016; OpenCV's implementation,
no weights, CPU). Estimated directly between a frame and frame 0: chaining through the frames between, or starting from
the chained flow, was measured to gain nothing (docs/log.md).

Both pictures are continued at their borders as in a mirror. Flow near the border gains by it, and the pyramid gains a
level, which fast motion needs. Besides, Stage I may have continued the picture just so where the camera has moved
beyond it; whether a mirrored place explains a frame is decided as always, but with more doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

if TYPE_CHECKING:
    from swifti2v.reference.options import ReferenceOptions

Array = np.ndarray[Any, Any]

# DIS fits patches of 8 pixels over a pyramid; smaller pictures are enlarged to this.
SMALLEST_SIDE = 16
# In pixels at output size: the window over which differences are averaged, and the one that defines local contrast.
WINDOW_SIGMA = 4.0
CONTRAST_SIGMA = 8.0
# Gray levels in [0, 1] below which contrast is not told from rounding to eight bits.
CONTRAST_FLOOR = 0.01
# Sides of the picture by which both pictures are continued as in a mirror.
MARGIN = 0.125
# By so much both widths of the confidence are narrower where the mirror explains: new content may resemble it.
MIRROR_DOUBT = 4.0


@dataclass(frozen=True)
class Correspondence:
    """What explains a frame by frame 0.

    Args:
        flow: [h', w', 2] float32: the place (x, y) of the frame is found in frame 0 at ``(x, y) + flow``, in fractions
            of the picture's width and height; beyond its borders frame 0 is mirrored.
        confidence: [h', w'] float32 in [0, 1].
    """

    flow: Array
    confidence: Array


def dense_flow(frame: Array, origin: Array) -> Array:
    """Return the DIS flow from `frame` to `origin`, both uint8 gray [h, w] of one size: [h, w, 2] float32, in pixels.

    ``origin(x + flow(x))`` resembles ``frame(x)``. Preset FAST, but down to full resolution: the two finest levels that
    the preset leaves out are worth about 1 dB of transported detail. Safe to call from several threads.
    """
    # A new estimator for every call: it keeps buffers, so that one may not be shared between threads.
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    estimator.setFinestScale(0)
    # The stubs of OpenCV ask for an initial flow; None is allowed and means none.
    return np.asarray(estimator.calc(frame, origin, None), dtype=np.float32)


class CorrespondenceEstimator:
    """Explains frames of a motion reference by its first one. Holds nothing that grows; calls may run in parallel.

    Args:
        origin: first frame of the motion reference, uint8 [h, w, 3] RGB.
        height: of the output, in pixels.
        width: of the output, in pixels.
        options: flow scale and confidence widths.
    """

    def __init__(self, origin: Array, height: int, width: int, *, options: ReferenceOptions) -> None:
        self.options = options
        self.size = (
            max(SMALLEST_SIDE, round(width * options.flow_scale)),
            max(SMALLEST_SIDE, round(height * options.flow_scale)),
        )
        # Sigmas are stated at output size; on the flow's grid they are as much smaller as the grid is.
        self.grid_scale = self.size[0] / width
        self.margins = (round(MARGIN * self.size[0]), round(MARGIN * self.size[1]))
        self.origin = self._mirrored(self._gray(origin))
        self.origin_unit = self.origin.astype(np.float32) / 255

    def __call__(self, frame: Array) -> Correspondence:
        """Explain `frame`, uint8 [h, w, 3] RGB of the first frame's size."""
        gray = self._gray(frame)
        (width, height), (left, top) = self.size, self.margins
        flow = dense_flow(self._mirrored(gray), self.origin)[top : top + height, left : left + width]
        confidence = self._confidence(flow, gray.astype(np.float32) / 255)
        return Correspondence(flow / np.asarray(self.size, dtype=np.float32), confidence)

    def _mirrored(self, gray: Array) -> Array:
        left, top = self.margins
        return np.asarray(cv2.copyMakeBorder(gray, top, top, left, left, cv2.BORDER_REFLECT))

    def _gray(self, frame: Array) -> Array:
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        enlarges = self.size[0] > gray.shape[1]
        return np.asarray(cv2.resize(gray, self.size, interpolation=cv2.INTER_CUBIC if enlarges else cv2.INTER_AREA))

    def _blur(self, values: Array, sigma: float) -> Array:
        return np.asarray(cv2.GaussianBlur(values, (0, 0), max(sigma * self.grid_scale, 0.5)))

    def _confidence(self, flow: Array, gray: Array) -> Array:
        """``exp(-(e / width)^2 - (q / mismatch_width)^2)``, and 0 where frame 0 with its margins has no such place.

        Both widths are `MIRROR_DOUBT` times narrower in the margins.

        e is the local mean absolute difference of warped and actual frame; q the same of the difference without its low
        frequencies (which lighting changes), over the frame's local contrast. Both were fitted to the shrinkage that
        minimizes the squared error, clean and damaged references together.
        """
        (width, height), (left, top) = self.size, self.margins
        x = flow[..., 0] + np.arange(left, left + width, dtype=np.float32)
        y = flow[..., 1] + np.arange(top, top + height, dtype=np.float32)[:, None]
        inside = (x >= 0) & (x <= width + 2 * left - 1) & (y >= 0) & (y <= height + 2 * top - 1)
        warped = cv2.remap(self.origin_unit, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        difference = np.asarray(warped) - gray
        error = self._blur(np.abs(difference), WINDOW_SIGMA)
        detail_error = self._blur(np.abs(difference - self._blur(difference, CONTRAST_SIGMA)), WINDOW_SIGMA)
        contrast = self._blur(np.abs(gray - self._blur(gray, CONTRAST_SIGMA)), WINDOW_SIGMA)
        mismatch = detail_error / (contrast + CONTRAST_FLOOR)
        exponent = (error / self.options.confidence_width) ** 2 + (mismatch / self.options.mismatch_width) ** 2
        mirrored = (x < left) | (x > left + width - 1) | (y < top) | (y > top + height - 1)
        return np.asarray(np.exp(-exponent * np.where(mirrored, MIRROR_DOUBT**2, 1)) * inside, dtype=np.float32)
