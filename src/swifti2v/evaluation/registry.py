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
"""Larger frames are reduced to this long side, in pixels, before the flow between neighboring frames is computed."""

_REDUCED = f"flow: {FLOW}, frames reduced to a long side of {FLOW_LONG_SIDE} px if larger"
_LUMA_SSIM = "of luma, Gaussian window 11, sigma 1.5, K 0.01 and 0.03 (Wang et al., IEEE TIP 2004)"
_MS_SSIM = "of luma on five scales, fewer below 176 px (Wang et al., Asilomar 2003)"
_DECIBELS = "-10 log10 of the mean squared difference of RGB in [0, 1]"
_STEP = f"the step of a frame: the median displacement in each of 4x4 blocks; {_REDUCED}"
_PULSE = (
    "the root of the covariance with itself 4 frames later less the mean of that at 3 and 5, 0 where negative: what "
    "repeats at latent frames"
)
_BORDERS = "the same at the borders of segments, held against the other borders of latent frames"


def _drift(name: str, what: str, unit: str) -> Metric:
    meaning = (
        f"|mean over the first 15% of frames - mean over the last 15%| of {what}, in {unit}; >= 0; start-end contrast "
        "of FramePack, arXiv 2504.12626"
    )
    return Metric(f"drift_{name}", f"{name} drift (%)", "zero", meaning)


_OF_START = "percent of the first"
_OF_RANGE = "percent of full scale"

METRICS: tuple[Metric, ...] = (
    Metric(
        "first_psnr", "frame 0 PSNR (dB)", "higher", f"{_DECIBELS} of frame 0 from the image fitted to it; 0 .. 100"
    ),
    Metric("first_ssim", "frame 0 SSIM", "higher", f"SSIM of frame 0 and the image, {_LUMA_SSIM}; -1 .. 1"),
    Metric("first_ms_ssim", "frame 0 MS-SSIM", "higher", f"MS-SSIM of frame 0 and the image, {_MS_SSIM}; 0 .. 1"),
    Metric(
        "detail_retention",
        "detail retention",
        "one",
        "<a, b> / max(<a, a>, <b, b>) of the high-pass (luma less its blur of sigma 2 px) of the image moved to the "
        "frame (a) and of the frame (b) on pixels that both show; mean over frames 8, 16, ... and the last; "
        f"flow: {FLOW} at full size; -1 .. 1",
    ),
    Metric("psnr", "PSNR (dB)", "higher", f"{_DECIBELS} from the truth, mean over frames; 0 .. 100"),
    Metric("ssim", "SSIM", "higher", f"SSIM with the truth, {_LUMA_SSIM}, mean over frames; -1 .. 1"),
    Metric("ms_ssim", "MS-SSIM", "higher", f"MS-SSIM with the truth, {_MS_SSIM}, mean over frames; 0 .. 1"),
    Metric(
        "vmaf",
        "VMAF",
        "higher",
        "VMAF v0.6.1 (made for HD seen from three screen heights) with the truth, of BT.709 luma in 16 .. 235, clipped "
        f"to 0 .. 100; mean over frames, above {SPARSE_ABOVE_PIXELS / 1e6:.1f} million px every {SPARSE_EVERY}th; "
        f"frame 0 counts as without motion and reaches 97.4; Netflix/vmaf, computed by {VMAF_PACKAGE}",
    ),
    Metric(
        "colorvideovdp",
        "ColorVideoVDP (JOD)",
        "higher",
        "10 less the just-objectionable differences that a viewer is predicted to see beside the truth, on a 4K screen "
        "of 30 inches and 200 cd/m2 from 0.75 m (standard_4k), whatever the size of the video; of all frames together; "
        "a point of its curve: if all frames were like this one, with a delay of about an eighth of a second; <= 10; "
        "Mantiuk et al., SIGGRAPH 2024, computed by cvvdp",
    ),
    Metric(
        "high_frequency_ratio",
        "high-frequency ratio",
        "one",
        "energy of the high-pass (luma less its blur of sigma 2 px) over that of the truth, mean over frames; below 1 "
        "is soft, above 1 noisy; >= 0",
    ),
    Metric(
        "psnr_uncovered",
        "PSNR, newly uncovered (dB)",
        "higher",
        f"{_DECIBELS} from the truth over all pixels whose content frame 0 does not show, by the truth's own motion "
        f"({FLOW}, long side 640 px); read it beside the next row; 0 .. 100",
    ),
    Metric(
        "psnr_persisting", "PSNR, persisting (dB)", "higher", f"{_DECIBELS} from the truth over all others; 0 .. 100"
    ),
    Metric(
        "segment_size",
        "likeliest segment size",
        "neither",
        "the segment size in latent frames whose seam ratio is largest; the largest of seven ratios lies above 1 by "
        "chance alone; 2 .. 8",
    ),
    Metric(
        "seam_luma",
        "seam ratio, luma",
        "one",
        "motion-compensated change at the borders of segments over that at the other borders of latent frames, each "
        f"relative to the two changes beside it; above 1: seams show; {_REDUCED}; >= 0",
    ),
    Metric(
        "seam_detail",
        "seam ratio, detail",
        "one",
        f"the same of the high-pass: sees jumps of sharpness and texture; {_REDUCED}; >= 0",
    ),
    Metric(
        "judder",
        "judder",
        "lower",
        "RMS of the change of the step from frame to frame over the RMS of the step: 0 is even, a hand-held pan has "
        f"0.4 to 0.5, above 0.6 it lurches; not defined where nothing moves; {_STEP}",
    ),
    Metric(
        "first_step",
        "first step over the median step",
        "one",
        f"length of the step from frame 0 to 1 over the median length of a step; above 1.5 it jumps; >= 0; {_STEP}",
    ),
    Metric(
        "backward_steps",
        "steps backward (%)",
        "zero",
        "share of steps against the direction of the whole motion, by more than 0.05 px and 5% of the median step; not "
        f"defined for motion to and fro; 0 .. 100; {_STEP}",
    ),
    Metric("motion_pulse", "jolts at latent frames", "lower", f"of the step, over its RMS: {_PULSE}; >= 0; {_STEP}"),
    Metric("motion_pulse_borders", "jolts at segment borders", "lower", f"{_BORDERS}; >= 0"),
    Metric(
        "sharpness_kept",
        "sharpness of frame 1 over frame 0",
        "one",
        "variance of the Laplacian of luma of frame 1 over that of frame 0; below 0.85 the drop is seen; >= 0",
    ),
    Metric(
        "sharpness_pulse",
        "sharpness pulsing (%)",
        "lower",
        f"of the variance of the Laplacian from frame 1 on, in percent of its mean: {_PULSE}; >= 0",
    ),
    Metric(
        "brightness_deviation",
        "brightness, deviation over time (levels)",
        "lower",
        "standard deviation of the mean luma of a frame from the straight line through it over time; 0 .. 128",
    ),
    Metric(
        "brightness_pulse",
        "brightness pulsing at latent frames (levels)",
        "lower",
        f"of the mean luma of a frame, in levels of 255: {_PULSE}; >= 0",
    ),
    Metric("brightness_pulse_borders", "brightness pulsing at segment borders (levels)", "lower", f"{_BORDERS}; >= 0"),
    Metric(
        "first_color_offset",
        "color offset of frame 0 (levels)",
        "lower",
        "change of the mean of red, green or blue from frame 0 to 1 less its median change after that, the largest of "
        "the three, in levels of 255; >= 0",
    ),
    _drift("sharpness", "the root mean square of the high-pass", _OF_START),
    _drift("contrast", "the standard deviation of luma", _OF_START),
    _drift("saturation", "the mean of max(R, G, B) - min(R, G, B)", _OF_START),
    _drift("red", "the mean of red", _OF_RANGE),
    _drift("green", "the mean of green", _OF_RANGE),
    _drift("blue", "the mean of blue", _OF_RANGE),
    Metric(
        "flicker",
        "flicker (levels)",
        "lower",
        "mean of |y(t) - (y(t-1) + y(t+1)) / 2|, y the mean luma of a frame in levels of 255; 0 .. 255",
    ),
    Metric(
        "warping_error",
        "flow-warping error (x 1000)",
        "lower",
        "1000 times the mean over pixels that both frames show of |frame - previous frame moved to it|^2, RGB in "
        f"[0, 1], summed over the channels; mean over frames; 0 for a still picture; {_REDUCED}; 0 .. 3000; Lai et "
        "al., ECCV 2018, with another flow, so that numbers compare with each other only",
    ),
    Metric(
        "change",
        "unexplained change (levels)",
        "lower",
        "mean absolute luma difference, in levels of 255, between a frame and the previous one moved to it, on pixels "
        f"that both show; its curve shows seams as peaks; mean over frames; {_REDUCED}; 0 .. 255",
    ),
    Metric(
        "flow_magnitude",
        "motion (px/frame)",
        "neither",
        f"mean length of the flow, in pixels of the video per frame, mean over frames; {_REDUCED}; >= 0",
    ),
    Metric(
        "flow_variation",
        "motion, deviation over time (px/frame)",
        "neither",
        "standard deviation over time of the mean length of the flow: motion that starts and stops at the borders of "
        f"segments raises it; {_REDUCED}; >= 0; StreamingT2V, arXiv 2403.14773",
    ),
    Metric(
        "still_share",
        "still pixels (%)",
        "neither",
        "share of pixels whose flow is below 0.1 px per frame (of the frames that the flow sees), mean over frames; "
        f"100 is a still picture; {_REDUCED}; 0 .. 100",
    ),
    Metric(
        "scene_cuts",
        "scene cuts",
        "zero",
        "frames that differ from the one before by at least 0.05 (mean absolute difference of RGB in [0, 1]) and three "
        f"times as much as the four around them, and of which motion explains less than half; {_REDUCED}",
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
