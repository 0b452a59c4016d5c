"""VMAF with the truth, frame by frame, by the optional package vmaf-torch, which brings the model's parameters."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.evaluation.motion import unit_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]

PACKAGE = "vmaf-torch"
MISSING = "VMAF: not installed; pip install 'swifti2v[vmaf]'"
"""What is said where the package is not there."""

SPARSE_ABOVE_PIXELS = 1920 * 1088
SPARSE_EVERY = 4
"""Of larger frames only every fourth is measured: at 2560x1408 VMAF costs as much as all other measures together."""

# BT.709 luma of a video file: 16 .. 235, whole levels.
_LUMA_OF_RGB = np.asarray([[0.2126, 0.7152, 0.0722]], dtype=np.float32)


class VmafFeatures(NamedTuple):
    """What VMAF is predicted from.

    Args:
        motion: mean absolute difference of the blurred truth from its frame before, in levels; NaN if not needed.
        quality: [1, 5], ADM and the four scales of VIF; None for a frame that is left out.
    """

    motion: float
    quality: Tensor | None


class VmafMeter:
    """VMAF v0.6.1 of frames that come one after the other; `measure` may run in several threads.

    Args:
        model: `vmaf_torch.VMAF` with clipped scores.
        every: measure frames 0, `every`, 2 `every`, ...
    """

    def __init__(self, model: Any, *, every: int = 1) -> None:
        self.every = every
        self._model = model

    def measure(self, index: int, frame: Array, truth: Array, earlier: Array | None) -> VmafFeatures:
        """Return the features of frame `index`.

        Args:
            index: of the frame.
            frame: RGB [H, W, 3], uint8 or float32 in [0, 1], at least 32x32.
            truth: the same.
            earlier: the truth's frame before; None for frame 0.
        """
        import torch

        is_measured, follows_one = index % self.every == 0, (index - 1) % self.every == 0
        if not is_measured and not follows_one:  # a measured frame needs the motion away from it too
            return VmafFeatures(math.nan, None)
        with torch.inference_mode():
            reference, motion = _video_luma(truth), 0.0
            if earlier is not None:
                motion = float(self._model.compute_motion(torch.cat([_video_luma(earlier), reference]))[1])
            if not is_measured:
                return VmafFeatures(motion, None)
            shown = _video_luma(frame)
            adm = self._model.compute_adm_score(reference, shown)
            vif = self._model.compute_vif_features(reference, shown)
            return VmafFeatures(motion, torch.cat((adm, vif), dim=-1))

    def scores(self, features: Sequence[VmafFeatures]) -> dict[int, float]:
        """Return ``{index of the frame: VMAF}``, 0 .. 100, of all frames of a video in order.

        Motion is the smaller of those to the frame before and to the frame after (Netflix' motion2). It is 0 at frame
        0, which therefore reaches 97.4 at most.
        """
        import torch

        motions = [each.motion for each in features]
        scores = {}
        with torch.inference_mode():
            for index, each in enumerate(features):
                if each.quality is None:
                    continue
                motion = torch.tensor([[min(motions[index : index + 2])]])
                adm, vif = each.quality[:, :1], each.quality[:, 1:]
                scores[index] = float(self._model.predict(adm, motion, vif))
        return scores


def open_vmaf(size: Size) -> VmafMeter | None:
    """Return a meter for frames of `size`, or None where vmaf-torch is not installed. Nothing is downloaded."""
    try:
        package = importlib.import_module("vmaf_torch")
    except ImportError:
        return None
    every = SPARSE_EVERY if size.width * size.height > SPARSE_ABOVE_PIXELS else 1
    return VmafMeter(package.VMAF(clip_score=True), every=every)


def _video_luma(frame: Array) -> Tensor:
    """Return luma as a file holds it, [1, 1, H, W] float32, whole levels of 16 .. 235."""
    import torch

    gray = np.asarray(cv2.transform(unit_rgb(frame), _LUMA_OF_RGB))
    return torch.from_numpy(np.rint(16 + 219 * gray)).reshape(1, 1, *gray.shape[:2])
