"""The judge of one video: one pass over its frames, a few of them in memory whatever its length.

Frames are measured on two threads (OpenCV and numpy let go of the interpreter's lock) while the next ones are decoded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from swifti2v.errors import VideoInputError
from swifti2v.evaluation.drift import Look, deviation, drift, flicker, look, scene_cuts
from swifti2v.evaluation.fidelity import similarity
from swifti2v.evaluation.metrics import (
    detail_retention,
    high_frequency_ratio,
    mean_flow,
    psnr,
    still_ratio,
    warping_error,
)
from swifti2v.evaluation.motion import FramePair
from swifti2v.evaluation.registry import FLOW_LONG_SIDE
from swifti2v.evaluation.results import Curve, VideoResult
from swifti2v.evaluation.seams import FrameChange, SeamRatio, frame_change, seam_ratio_of_changes

if TYPE_CHECKING:
    from swifti2v.evaluation.colorvideovdp import ColorVideoVdp
    from swifti2v.evaluation.sources import FrameSource
    from swifti2v.evaluation.vmaf import VmafFeatures, VmafMeter
    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]
OnFrame = Callable[[int, int | None], None]
"""Called with the number of frames read, and their total if it is known; ColorVideoVDP counts anew."""

NUM_THREADS = 2
# Two frames at work, one ready and one being decoded.
FRAMES_IN_FLIGHT = 3
DETAIL_EVERY = 8
CANDIDATE_SEGMENT_SIZES = range(2, 9)
SMALLEST_SIDE = 32
STILL_FROM = 0.995
"""A video of which more pixels than this stand still is called a still picture."""

DRIFTING = ("sharpness", "contrast", "saturation", "red", "green", "blue")


@dataclass(frozen=True)
class Standard:
    """What a video is held against, all of the video's size.

    Args:
        image: uint8 RGB [H, W, 3], or None.
        truth: or None.
        segment_size: latent frames in a segment; None finds the likeliest of 2 .. 8.
        vmaf: of frames with their truth, or None.
        colorvideovdp: of the video with its truth, or None.
    """

    image: Array | None = None
    truth: FrameSource | None = None
    segment_size: int | None = 3
    vmaf: VmafMeter | None = None
    colorvideovdp: ColorVideoVdp | None = None


class PairMeasures(NamedTuple):
    """Measures of two neighbouring frames; `flow` in pixels of these frames, shares and differences in 0 .. 1."""

    change: FrameChange
    warping_error: float
    flow: float
    still: float
    visible: float
    difference: float


class Fidelity(NamedTuple):
    """Likeness of a frame to its truth."""

    psnr: float
    ssim: float
    ms_ssim: float
    high_frequency_ratio: float


# What measuring a frame against itself gives, without the minutes that it takes for the control of a long video.
STILL_PAIR = PairMeasures(FrameChange(0.0, 0.0), 0.0, 0.0, 1.0, 1.0, 0.0)


def judge_video(source: FrameSource, standard: Standard, *, on_frame: OnFrame | None = None) -> VideoResult:
    """Return everything that can be said of a video, by the names of `registry.METRICS`.

    Raises:
        VideoInputError: the video or the truth is damaged, or the video is too small.
        InvalidInputError: ColorVideoVDP is asked for, and fails.
        MemoryBudgetError: ColorVideoVDP runs out of memory.
    """
    if min(source.size) < SMALLEST_SIDE:
        msg = f"{source.label} is {source.size}; videos of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} can be judged"
        raise VideoInputError(msg)
    with ThreadPoolExecutor(NUM_THREADS) as executor:
        judge = _Judge(executor, standard, flow_scale(source.size))
        try:
            judge.watch(source, on_frame)
        except BaseException:  # Ctrl-C too: what waits in the queue need not be done
            executor.shutdown(cancel_futures=True)
            raise
    findings = _Findings(list(source.notes))
    _say_look(findings, judge)
    _say_motion(findings, judge)
    if source.path is not None:  # a still control says itself that it is one
        _say_still(findings)
    _say_seams(findings, judge, standard.segment_size)
    _say_image(findings, judge)
    _say_truth(findings, judge, standard)
    _say_visible(findings, source, standard, num_frames=len(judge.fidelities), on_frame=on_frame)
    num_frames = len(judge.looks)
    values, curves, notes = findings.values, tuple(findings.curves), tuple(findings.notes)
    return VideoResult(
        source.label, source.path, *source.size, num_frames, source.fps, values, curves=curves, notes=notes
    )


def measure_pair(earlier: Array, later: Array) -> PairMeasures:
    """Return the measures of two neighbouring frames, each flow computed once."""
    pair = FramePair(earlier, later)
    return PairMeasures(
        frame_change(pair),
        warping_error(pair),
        mean_flow(pair).magnitude,
        still_ratio((pair,)),
        float(pair.visible.mean()),
        float(np.abs(pair.later - pair.earlier).mean(dtype=np.float64)),
    )


def measure_fidelity(frame: Array, truth: Array) -> Fidelity:
    """Return the likeness of a frame to its truth, or of frame 0 to the image."""
    return Fidelity(psnr(frame, truth), *similarity(frame, truth), high_frequency_ratio(frame, truth))


def likeliest_segment_size(changes: Sequence[FrameChange]) -> tuple[int, SeamRatio] | None:
    """Return the segment size of 2 .. 8 latent frames whose seams show most, and its ratios; None if too short."""
    ratios = ((size, seam_ratio_of_changes(changes, segment_size=size)) for size in CANDIDATE_SEGMENT_SIZES)
    defined = [(size, ratio) for size, ratio in ratios if math.isfinite(ratio.worst)]
    return max(defined, key=lambda entry: entry[1].worst, default=None)


def flow_scale(size: Size) -> float:
    """Return the factor by which frames are made smaller before the flow of neighbours is computed; at most 1."""
    return min(1.0, FLOW_LONG_SIDE / max(size))


@dataclass
class _Moment:
    """The measures of one frame, finished or not."""

    look: Future[Look]
    pair: Future[PairMeasures] | None
    fidelity: Future[Fidelity] | None
    vmaf: Future[VmafFeatures] | None


class _Judge:
    """Watches a video once and keeps numbers only."""

    def __init__(self, executor: ThreadPoolExecutor, standard: Standard, scale: float) -> None:
        self.looks: list[Look] = []
        self.pairs: list[PairMeasures] = []
        self.details: dict[int, float] = {}
        self.fidelities: list[Fidelity] = []
        self.vmafs: list[VmafFeatures] = []
        self.first: Fidelity | None = None
        self.truth_goes_on = False
        self.scale = scale
        self._executor = executor
        self._standard = standard
        self._frame: Array | None = None
        self._truth: Array | None = None
        self._reduced: Array | None = None
        self._detailed: Array | None = None
        self._last: _Moment | None = None
        self._still_pair: Future[PairMeasures] = Future()
        self._still_pair.set_result(STILL_PAIR)

    def watch(self, source: FrameSource, on_frame: OnFrame | None) -> None:
        """Measure every frame; what was found is then in the attributes."""
        truth = self._standard.truth
        waiting: deque[_Moment] = deque()
        details: dict[int, Future[float]] = {}
        with closing(source.frames()) as frames, closing(truth.frames() if truth else _no_frames()) as truths:
            for index, frame in enumerate(frames):
                if index == 0 and self._standard.image is not None:
                    self.first = measure_fidelity(frame, self._standard.image)
                waiting.append(self._start(index, frame, next(truths, None)))
                if index and index % DETAIL_EVERY == 0:
                    self._start_detail(index, details)
                if len(waiting) == FRAMES_IN_FLIGHT:
                    self._collect(waiting.popleft())
                if on_frame is not None:
                    on_frame(index + 1, source.num_frames)
            self.truth_goes_on = next(truths, None) is not None
        while waiting:
            self._collect(waiting.popleft())
        if len(self.looks) > 1 and len(self.looks) - 1 not in details:
            self._start_detail(len(self.looks) - 1, details)
        self.details = {index: detail.result() for index, detail in details.items()}

    def _start(self, index: int, frame: Array, truth: Array | None) -> _Moment:
        """Queue the measures of a frame; one that repeats the last frame's array takes its measures over."""
        submit = self._executor.submit
        pair: Future[PairMeasures] | None
        if frame is self._frame and self._last is not None:
            shown, pair = self._last.look, self._still_pair
        else:
            reduced = _reduced(frame, self.scale)
            shown = submit(look, frame)
            pair = None if self._reduced is None else submit(measure_pair, self._reduced, reduced)
            self._frame, self._reduced = frame, reduced
        fidelity = None if truth is None else submit(measure_fidelity, frame, truth)
        meter, vmaf = self._standard.vmaf, None
        if meter is not None and truth is not None:
            vmaf = submit(meter.measure, index, frame, truth, self._truth)
            self._truth = truth
        self._last = _Moment(shown, pair, fidelity, vmaf)
        return self._last

    def _start_detail(self, index: int, details: dict[int, Future[float]]) -> None:
        """Queue the detail of the frame last started."""
        image, frame = self._standard.image, self._frame
        if image is None or frame is None:
            return
        if frame is self._detailed:
            details[index] = next(reversed(details.values()))
        else:
            details[index] = self._executor.submit(_detail, image, frame)
            self._detailed = frame

    def _collect(self, moment: _Moment) -> None:
        self.looks.append(moment.look.result())
        if moment.pair is not None:
            self.pairs.append(moment.pair.result())
        if moment.fidelity is not None:
            self.fidelities.append(moment.fidelity.result())
        if moment.vmaf is not None:
            self.vmafs.append(moment.vmaf.result())


@dataclass
class _Findings:
    """The parts of a `VideoResult` while they are put together."""

    notes: list[str]
    values: dict[str, float] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        self.values[name] = float(value)

    def add_curve(self, name: str, values: Sequence[float], *, frames: Sequence[int]) -> None:
        """A metric over time, and its mean over the frames where it is defined as its value."""
        defined = [value for value in values if math.isfinite(value)]
        self.values.setdefault(name, math.fsum(defined) / len(defined) if defined else math.nan)
        if values:
            self.curves.append(Curve(name, tuple(frames), tuple(float(value) for value in values)))


def _say_look(findings: _Findings, judge: _Judge) -> None:
    everywhere = range(len(judge.looks))
    for name in DRIFTING:
        course = [float(getattr(each, name)) for each in judge.looks]
        findings.add(f"drift_{name}", drift(name, course))
        findings.add_curve(f"drift_{name}", deviation(name, course), frames=everywhere)
    flickers = flicker([each.brightness for each in judge.looks])
    findings.add_curve("flicker", flickers, frames=range(1, 1 + len(flickers)))


def _say_motion(findings: _Findings, judge: _Judge) -> None:
    pairs = judge.pairs
    later = range(1, 1 + len(pairs))
    findings.add_curve("warping_error", [1000 * pair.warping_error for pair in pairs], frames=later)
    findings.add_curve("change", [255 * pair.change.luma for pair in pairs], frames=later)
    motion = [pair.flow / judge.scale for pair in pairs]
    findings.add_curve("flow_magnitude", motion, frames=later)
    findings.add("flow_variation", float(np.std(motion)) if motion else math.nan)
    findings.add_curve("still_share", [100 * pair.still for pair in pairs], frames=later)
    if not pairs:
        findings.add("scene_cuts", math.nan)
        findings.notes.append("it has one frame: nothing can be said of motion and change")
        return
    cuts = scene_cuts([pair.difference for pair in pairs], [pair.visible for pair in pairs])
    findings.add("scene_cuts", len(cuts))
    if cuts:
        findings.notes.append(f"new scenes begin at frames {', '.join(map(str, cuts))}")


def _say_still(findings: _Findings) -> None:
    still = findings.values["still_share"]
    if still >= 100 * STILL_FROM:
        findings.notes.append(
            f"this is a still picture: {still:.4g}% of its pixels do not move, and measures that motion or change "
            "makes worse say nothing good of it"
        )


def _say_seams(findings: _Findings, judge: _Judge, segment_size: int | None) -> None:
    changes = [pair.change for pair in judge.pairs]
    if segment_size is not None:
        ratio = seam_ratio_of_changes(changes, segment_size=segment_size)
    else:
        size, ratio = likeliest_segment_size(changes) or (math.nan, SeamRatio(math.nan, math.nan))
        findings.add("segment_size", size)
    findings.add("seam_luma", ratio.luma)
    findings.add("seam_detail", ratio.detail)
    if math.isnan(ratio.worst):
        findings.notes.append("it is too short to have borders of segments and others: no seam ratio")


def _say_image(findings: _Findings, judge: _Judge) -> None:
    if judge.first is None:
        return
    findings.add("first_psnr", judge.first.psnr)
    findings.add("first_ssim", judge.first.ssim)
    findings.add("first_ms_ssim", judge.first.ms_ssim)
    findings.add_curve("detail_retention", list(judge.details.values()), frames=list(judge.details))


def _say_truth(findings: _Findings, judge: _Judge, standard: Standard) -> None:
    if standard.truth is None:
        return
    compared, shown = len(judge.fidelities), len(judge.looks)
    for name in Fidelity._fields:
        findings.add_curve(name, [getattr(each, name) for each in judge.fidelities], frames=range(compared))
    if standard.vmaf is not None:
        scores = standard.vmaf.scores(judge.vmafs)
        findings.add_curve("vmaf", list(scores.values()), frames=list(scores))
    if compared < shown:
        findings.notes.append(f"the truth ends after {compared} of {shown} frames: compared on those")
    elif judge.truth_goes_on:
        findings.notes.append(f"the truth is longer: compared on its first {shown} frames")


def _say_visible(
    findings: _Findings, source: FrameSource, standard: Standard, *, num_frames: int, on_frame: OnFrame | None
) -> None:
    """Ask ColorVideoVDP in a pass of its own: it has to know the number of frames beforehand."""
    meter, truth = standard.colorvideovdp, standard.truth
    if meter is None or truth is None or not num_frames:
        return
    with closing(source.frames()) as frames, closing(truth.frames()) as truths:

        def pairs() -> Generator[tuple[Array, Array]]:
            for done, pair in enumerate(islice(zip(frames, truths, strict=False), num_frames), start=1):
                yield pair
                if on_frame is not None:
                    on_frame(done, num_frames)

        scores = meter.scores(pairs(), size=source.size, fps=source.fps, num_frames=num_frames)
    findings.add("colorvideovdp", scores.total)
    findings.add_curve("colorvideovdp", scores.frames, frames=range(num_frames))


def _detail(image: Array, frame: Array) -> float:
    return detail_retention(FramePair(image, frame)).retention


def _reduced(frame: Array, scale: float) -> Array:
    if scale == 1:
        return frame
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))


def _no_frames() -> Generator[Array]:
    yield from ()
