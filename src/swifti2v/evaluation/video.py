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
from swifti2v.evaluation.evenness import (
    BLOCKS,
    Uncovered,
    block_steps,
    evenness,
    in_words,
    split_error,
    split_psnr,
)
from swifti2v.evaluation.metrics import (
    detail_retention,
    flow_magnitude,
    high_frequency_ratio,
    psnr,
    similarity,
    still_share,
    warping_error,
)
from swifti2v.evaluation.motion import FramePair
from swifti2v.evaluation.registry import FLOW_LONG_SIDE
from swifti2v.evaluation.results import Curve, VideoResult
from swifti2v.evaluation.seams import FrameChange, SeamRatio, frame_change, seam_ratio

if TYPE_CHECKING:
    from swifti2v.evaluation.colorvideovdp import ColorVideoVdp
    from swifti2v.evaluation.sources import FrameSource
    from swifti2v.evaluation.vmaf import VmafFeatures, VmafMeter
    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]
OnFrame = Callable[[int, int | None], None]
"""Called with the number of frames read, and their total if it is known; ColorVideoVDP counts anew."""

NUM_THREADS = 2
FRAMES_IN_FLIGHT = 3  # two frames at work and one ready, while another is decoded
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
    """Measures of two neighboring frames; lengths in pixels of these frames, shares and differences 0 .. 1."""

    change: FrameChange
    warping_error: float
    flow: float
    still: float
    visible: float
    difference: float
    steps: Array


class Fidelity(NamedTuple):
    """Likeness of a frame to its truth."""

    psnr: float
    ssim: float
    ms_ssim: float
    high_frequency_ratio: float


# What measuring a frame against itself gives, without the minutes that it takes for the control of a long video.
STILL_PAIR = PairMeasures(FrameChange(0.0, 0.0), 0.0, 0.0, 1.0, 1.0, 0.0, np.zeros(2 * BLOCKS**2))


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
        watched = _Watched(executor, standard, flow_scale(source.size))
        try:
            watched.watch(source, on_frame)
        except BaseException:  # Ctrl-C too: what waits in the queue need not be done
            executor.shutdown(cancel_futures=True)
            raise
    findings = _Findings(list(source.notes))
    _add_look(findings, watched.looks)
    _add_motion(findings, watched)
    if findings.values["still_share"] >= 100 * STILL_FROM and source.path is not None:  # the control says it itself
        findings.notes.append(
            f"this is a still picture: {findings.values['still_share']:.4g}% of its pixels do not move, and measures "
            "that motion or change makes worse say nothing good of it"
        )
    segment_size = _add_seams(findings, watched.pairs, standard.segment_size)
    if watched.first is not None:
        findings.values |= {f"first_{name}": getattr(watched.first, name) for name in ("psnr", "ssim", "ms_ssim")}
        findings.add_curve("detail_retention", list(watched.details.values()), frames=list(watched.details))
    if standard.truth is not None:
        _add_truth(findings, watched, standard)
        _add_visible_differences(findings, source, standard, len(watched.fidelities), on_frame)
    findings.values |= evenness([pair.steps for pair in watched.pairs], watched.looks, segment_size=segment_size)
    if source.path is not None:
        findings.notes += in_words(findings.values, segment_size=segment_size)
    return VideoResult(
        source.label,
        source.path,
        *source.size,
        len(watched.looks),
        source.fps,
        findings.values,
        curves=tuple(findings.curves),
        notes=tuple(findings.notes),
    )


def measure_pair(earlier: Array, later: Array) -> PairMeasures:
    """Return the measures of two neighboring frames, each flow computed once."""
    pair = FramePair(earlier, later)
    return PairMeasures(
        frame_change(pair),
        warping_error(pair),
        flow_magnitude(pair),
        still_share(pair),
        float(pair.visible.mean()),
        float(np.abs(pair.later - pair.earlier).mean(dtype=np.float64)),
        block_steps(pair.forward),
    )


def measure_fidelity(frame: Array, truth: Array) -> Fidelity:
    """Return the likeness of a frame to its truth, or of frame 0 to the image."""
    return Fidelity(psnr(frame, truth), *similarity(frame, truth), high_frequency_ratio(frame, truth))


def likeliest_segment_size(changes: Sequence[FrameChange]) -> tuple[int, SeamRatio] | None:
    """Return the segment size of 2 .. 8 latent frames whose seams show most, and its ratios; None if too short."""
    ratios = ((size, seam_ratio(changes, segment_size=size)) for size in CANDIDATE_SEGMENT_SIZES)
    defined = [(size, ratio) for size, ratio in ratios if math.isfinite(ratio.worst)]
    return max(defined, key=lambda entry: entry[1].worst, default=None)


def flow_scale(size: Size) -> float:
    """Return the factor by which frames are made smaller before the flow of neighbors is computed; at most 1."""
    return min(1.0, FLOW_LONG_SIDE / max(size))


class _Moment(NamedTuple):
    """The measures of one frame, finished or not; None where there is nothing to compare with."""

    look: Future[Look]
    pair: Future[PairMeasures] | None = None
    fidelity: Future[Fidelity] | None = None
    errors: Future[Array] | None = None
    vmaf: Future[VmafFeatures] | None = None


class _Watched:
    """What is kept of a video that was watched once: numbers only."""

    def __init__(self, executor: ThreadPoolExecutor, standard: Standard, scale: float) -> None:
        self.looks: list[Look] = []
        self.pairs: list[PairMeasures] = []
        self.details: dict[int, float] = {}
        self.fidelities: list[Fidelity] = []
        self.errors: list[Array] = []
        self.vmafs: list[VmafFeatures] = []
        self.first: Fidelity | None = None
        self.truth_goes_on = False
        self.scale = scale
        self._executor = executor
        self._standard = standard
        self._uncovered = Uncovered()
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
        if frame is self._frame and self._last is not None:
            moment = _Moment(self._last.look, self._still_pair)
        else:
            reduced = _reduced(frame, self.scale)
            pair = None if self._reduced is None else submit(measure_pair, self._reduced, reduced)
            moment = _Moment(submit(look, frame), pair)
            self._frame, self._reduced = frame, reduced
        if truth is not None:
            moment = moment._replace(
                fidelity=submit(measure_fidelity, frame, truth),
                errors=submit(split_error, frame, truth, self._uncovered(truth)),
            )
            if self._standard.vmaf is not None:
                vmaf = submit(self._standard.vmaf.measure, index, frame, truth, self._truth)
                moment = moment._replace(vmaf=vmaf)
            self._truth = truth
        self._last = moment
        return moment

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
        lists: tuple[list[Any], ...] = (self.looks, self.pairs, self.fidelities, self.errors, self.vmafs)
        for values, measure in zip(lists, moment, strict=True):
            if measure is not None:
                values.append(measure.result())


@dataclass
class _Findings:
    """The parts of a `VideoResult` while they are put together."""

    notes: list[str]
    values: dict[str, float] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def add_curve(self, name: str, values: Sequence[float], *, frames: Sequence[int]) -> None:
        """A metric over time, and its mean over the frames where it is defined as its value."""
        defined = [value for value in values if math.isfinite(value)]
        self.values.setdefault(name, math.fsum(defined) / len(defined) if defined else math.nan)
        if values:
            self.curves.append(Curve(name, tuple(frames), tuple(float(value) for value in values)))


def _add_look(findings: _Findings, looks: Sequence[Look]) -> None:
    for name in DRIFTING:
        course = [float(getattr(each, name)) for each in looks]
        findings.values[f"drift_{name}"] = drift(name, course)
        findings.add_curve(f"drift_{name}", deviation(name, course), frames=range(len(looks)))
    flickers = flicker([each.brightness for each in looks])
    findings.add_curve("flicker", flickers, frames=range(1, 1 + len(flickers)))


def _add_motion(findings: _Findings, watched: _Watched) -> None:
    pairs = watched.pairs
    later = range(1, 1 + len(pairs))
    motion = [pair.flow / watched.scale for pair in pairs]
    findings.add_curve("warping_error", [1000 * pair.warping_error for pair in pairs], frames=later)
    findings.add_curve("change", [255 * pair.change.luma for pair in pairs], frames=later)
    findings.add_curve("flow_magnitude", motion, frames=later)
    findings.values["flow_variation"] = float(np.std(motion)) if motion else math.nan
    findings.add_curve("still_share", [100 * pair.still for pair in pairs], frames=later)
    findings.values["scene_cuts"] = math.nan
    if not pairs:
        findings.notes.append("it has one frame: nothing can be said of motion and change")
        return
    cuts = scene_cuts([pair.difference for pair in pairs], [pair.visible for pair in pairs])
    findings.values["scene_cuts"] = len(cuts)
    if cuts:
        findings.notes.append(f"new scenes begin at frames {', '.join(map(str, cuts))}")


def _add_seams(findings: _Findings, pairs: Sequence[PairMeasures], segment_size: int | None) -> int | None:
    """Add the seam ratios; return the segment size that they are of, None if none was given or found."""
    changes = [pair.change for pair in pairs]
    if segment_size is not None:
        ratio = seam_ratio(changes, segment_size=segment_size)
    else:
        segment_size, ratio = likeliest_segment_size(changes) or (None, SeamRatio(math.nan, math.nan))
        findings.values["segment_size"] = math.nan if segment_size is None else segment_size
    findings.values |= {"seam_luma": ratio.luma, "seam_detail": ratio.detail}
    if math.isnan(ratio.worst):
        findings.notes.append("it is too short to have borders of segments and others: no seam ratio")
    return segment_size


def _add_truth(findings: _Findings, watched: _Watched, standard: Standard) -> None:
    compared, shown = len(watched.fidelities), len(watched.looks)
    for name in Fidelity._fields:
        findings.add_curve(name, [getattr(each, name) for each in watched.fidelities], frames=range(compared))
    uncovered, persisting = split_psnr(watched.errors)
    findings.values |= {"psnr_uncovered": uncovered, "psnr_persisting": persisting}
    if standard.vmaf is not None:
        scores = standard.vmaf.scores(watched.vmafs)
        findings.add_curve("vmaf", list(scores.values()), frames=list(scores))
    if compared < shown:
        findings.notes.append(f"the truth ends after {compared} of {shown} frames: compared on those")
    elif watched.truth_goes_on:
        findings.notes.append(f"the truth is longer: compared on its first {shown} frames")


def _add_visible_differences(
    findings: _Findings, source: FrameSource, standard: Standard, num_frames: int, on_frame: OnFrame | None
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
    findings.values["colorvideovdp"] = scores.total
    findings.add_curve("colorvideovdp", scores.frames, frames=range(num_frames))


def _detail(image: Array, frame: Array) -> float:
    return detail_retention(FramePair(image, frame))


def _reduced(frame: Array, scale: float) -> Array:
    if scale == 1:
        return frame
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))


def _no_frames() -> Generator[Array]:
    yield from ()
