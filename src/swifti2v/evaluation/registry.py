"""What every number of an evaluation means: its formula, its range, which values are good, where it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swifti2v.evaluation.results import Metric
from swifti2v.evaluation.vmaf import PACKAGE as VMAF_PACKAGE
from swifti2v.evaluation.vmaf import SPARSE_ABOVE_PIXELS, SPARSE_EVERY

if TYPE_CHECKING:
    from collections.abc import Iterable

FLOW = "OpenCV DIS"
"""The optical flow of every motion-compensated measure (Kroeger et al., ECCV 2016; preset medium, finest scale 0)."""

FLOW_LONG_SIDE = 1280
"""Larger frames are reduced to this long side, in pixels, before the flow between neighbouring frames is computed."""

_REDUCED = f"flow: {FLOW}, frames reduced to a long side of {FLOW_LONG_SIDE} px if larger"
_FULL = f"flow: {FLOW} at full size"
_SSIM = "Wang et al., IEEE TIP 2004"
_MS_SSIM = "Wang et al., Asilomar 2003"
_LUMA_SSIM = "of luma, Gaussian window 11, sigma 1.5, K 0.01 and 0.03"
_FIVE_SCALES = f"{_LUMA_SSIM}, five scales (fewer below 176 px)"
_PACKING = "FramePack, arXiv 2504.12626, start-end contrast"
_VMAF_LIMIT = f"{SPARSE_ABOVE_PIXELS / 1e6:.1f} million"
_OWN = "SwiftI2V"


def _drift(name: str, label: str, what: str, unit: str) -> Metric:
    formula = f"|mean over the first 15% of frames - mean over the last 15%| of {what}, in {unit}"
    return Metric(f"drift_{name}", f"{label} drift (%)", "zero", ">= 0", formula, _PACKING)


_OF_START = "percent of the first"
_OF_RANGE = "percent of full scale"

METRICS: tuple[Metric, ...] = (
    Metric(
        "first_psnr",
        "frame 0 PSNR (dB)",
        "higher",
        "0 .. 100",
        "-10 log10 of the mean squared difference of RGB in [0, 1] between frame 0 and the image fitted to its size",
        _OWN,
    ),
    Metric("first_ssim", "frame 0 SSIM", "higher", "-1 .. 1", f"SSIM of frame 0 and the image, {_LUMA_SSIM}", _SSIM),
    Metric(
        "first_ms_ssim",
        "frame 0 MS-SSIM",
        "higher",
        "0 .. 1",
        f"MS-SSIM of frame 0 and the image, {_FIVE_SCALES}",
        _MS_SSIM,
    ),
    Metric(
        "detail_retention",
        "detail retention",
        "one",
        "-1 .. 1",
        "<a, b> / max(<a, a>, <b, b>) of the high-pass (luma less its blur of sigma 2 px) of the image moved to the "
        "frame (a) and of the frame (b) on pixels that both show; mean over frames 8, 16, ... and the last; "
        f"{_FULL}",
        _OWN,
    ),
    Metric(
        "psnr",
        "PSNR (dB)",
        "higher",
        "0 .. 100",
        "-10 log10 of the mean squared difference of RGB in [0, 1] from the truth, mean over frames",
        _OWN,
    ),
    Metric("ssim", "SSIM", "higher", "-1 .. 1", f"SSIM with the truth, {_LUMA_SSIM}, mean over frames", _SSIM),
    Metric(
        "ms_ssim",
        "MS-SSIM",
        "higher",
        "0 .. 1",
        f"MS-SSIM with the truth, {_FIVE_SCALES}, mean over frames",
        _MS_SSIM,
    ),
    Metric(
        "vmaf",
        "VMAF",
        "higher",
        "0 .. 100",
        "VMAF v0.6.1 (made for HD seen from three screen heights) with the truth, of BT.709 luma in 16 .. 235, clipped "
        f"to the range; mean over frames, above {_VMAF_LIMIT} px every {SPARSE_EVERY}th; frame 0 counts as without "
        "motion and reaches 97.4",
        f"Netflix/vmaf, computed by {VMAF_PACKAGE}",
    ),
    Metric(
        "colorvideovdp",
        "ColorVideoVDP (JOD)",
        "higher",
        "<= 10",
        "10 less the just-objectionable differences that a viewer is predicted to see beside the truth, on a 4K screen "
        "of 30 inches and 200 cd/m2 from 0.75 m (standard_4k), whatever the size of the video; of all frames together. "
        "A point of its curve: if all frames were like this one; it follows the frames by about an eighth of a second",
        "Mantiuk et al., SIGGRAPH 2024, computed by cvvdp",
    ),
    Metric(
        "high_frequency_ratio",
        "high-frequency ratio",
        "one",
        ">= 0",
        "energy of the high-pass (luma less its blur of sigma 2 px) over that of the truth, mean over frames; below 1 "
        "is soft, above 1 noisy",
        _OWN,
    ),
    Metric(
        "segment_size",
        "likeliest segment size",
        "neither",
        "2 .. 8",
        "the segment size in latent frames whose seam ratio is largest; the largest of seven ratios lies above 1 by "
        "chance alone",
        _OWN,
    ),
    Metric(
        "seam_luma",
        "seam ratio, luma",
        "one",
        ">= 0",
        "motion-compensated change at the borders of segments over that at the other borders of latent frames, each "
        f"relative to the two changes beside it; above 1: seams show; {_REDUCED}",
        _OWN,
    ),
    Metric(
        "seam_detail",
        "seam ratio, detail",
        "one",
        ">= 0",
        f"the same of the high-pass: sees jumps of sharpness and texture; {_REDUCED}",
        _OWN,
    ),
    _drift("sharpness", "sharpness", "the root mean square of the high-pass", _OF_START),
    _drift("contrast", "contrast", "the standard deviation of luma", _OF_START),
    _drift("saturation", "saturation", "the mean of max(R, G, B) - min(R, G, B)", _OF_START),
    _drift("red", "red", "the mean of red", _OF_RANGE),
    _drift("green", "green", "the mean of green", _OF_RANGE),
    _drift("blue", "blue", "the mean of blue", _OF_RANGE),
    Metric(
        "flicker",
        "flicker (levels)",
        "lower",
        "0 .. 255",
        "mean of |y(t) - (y(t-1) + y(t+1)) / 2|, y the mean luma of a frame in levels of 255",
        _OWN,
    ),
    Metric(
        "warping_error",
        "flow-warping error (x 1000)",
        "lower",
        "0 .. 3000",
        "1000 times the mean over pixels that both frames show of |frame - previous frame moved to it|^2, RGB in "
        f"[0, 1], summed over the channels; mean over frames; 0 for a still picture; {_REDUCED}",
        "Lai et al., ECCV 2018; flow differs, so numbers compare with each other only",
    ),
    Metric(
        "change",
        "unexplained change (levels)",
        "lower",
        "0 .. 255",
        "mean absolute luma difference, in levels of 255, between a frame and the previous one moved to it, on pixels "
        f"that both show; its curve shows seams as peaks; mean over frames; {_REDUCED}",
        _OWN,
    ),
    Metric(
        "flow_magnitude",
        "motion (px/frame)",
        "neither",
        ">= 0",
        f"mean length of the flow, in pixels of the video per frame, mean over frames; {_REDUCED}",
        _OWN,
    ),
    Metric(
        "flow_variation",
        "motion, deviation over time (px/frame)",
        "neither",
        ">= 0",
        "standard deviation over time of the mean length of the flow: motion that starts and stops at the borders of "
        f"segments raises it; {_REDUCED}",
        "StreamingT2V, arXiv 2403.14773",
    ),
    Metric(
        "still_share",
        "still pixels (%)",
        "neither",
        "0 .. 100",
        "share of pixels whose flow is below 0.1 px per frame (of the frames that the flow sees), mean over frames; "
        f"100 is a still picture; {_REDUCED}",
        _OWN,
    ),
    Metric(
        "scene_cuts",
        "scene cuts",
        "zero",
        ">= 0",
        "frames that differ from the one before by at least 0.05 (mean absolute difference of RGB in [0, 1]) and three "
        f"times as much as the four around them, and of which motion explains less than half; {_REDUCED}",
        _OWN,
    ),
)
"""Every metric, in the order of tables."""


def metrics_of(names: Iterable[str]) -> tuple[Metric, ...]:
    """Return what `names` mean, in the order of tables.

    Raises:
        KeyError: a name is not registered.
    """
    wanted = set(names)
    unknown = wanted - {metric.name for metric in METRICS}
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    return tuple(metric for metric in METRICS if metric.name in wanted)
