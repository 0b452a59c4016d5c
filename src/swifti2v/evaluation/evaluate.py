"""Videos judged together: each by the same standard and at the same size, with a still picture as the control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from swifti2v import __version__
from swifti2v.errors import InvalidInputError
from swifti2v.evaluation.colorvideovdp import open_colorvideovdp
from swifti2v.evaluation.registry import FLOW, FLOW_LONG_SIDE, metrics_of
from swifti2v.evaluation.results import Evaluation, VideoResult
from swifti2v.evaluation.sources import FrameSource, first_frame, open_truth, open_video, still_video
from swifti2v.evaluation.video import Standard, judge_video
from swifti2v.evaluation.vmaf import MISSING as VMAF_MISSING
from swifti2v.evaluation.vmaf import PACKAGE as VMAF_PACKAGE
from swifti2v.evaluation.vmaf import open_vmaf
from swifti2v.geometry import Size
from swifti2v.media.images import fit_image, fit_notes, load_image

Array = np.ndarray[Any, Any]
OnProgress = Callable[[str, int, int | None], None]
"""Called with the label of the video being judged, the number of frames read, and their total if it is known."""

STILL_LABEL = "still image"
DEFAULT_SEGMENT_SIZE = 3
PACKAGES = ("av", "numpy", "opencv-python-headless", VMAF_PACKAGE)


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be judged.

    Args:
        videos: files, one or more; everything is judged at the size of the first.
        against: other files, judged in the same way.
        image: the input image, or None.
        truth: the true video, or None.
        segment_size: latent frames in a segment, >= 2; None finds the likeliest for each video.
        cvvdp: interpreter of an environment with the package cvvdp, for ColorVideoVDP; None leaves it out.

    Raises:
        InvalidInputError: there is no video, `segment_size` is below 2, or ColorVideoVDP has no truth.
    """

    videos: tuple[Path, ...]
    against: tuple[Path, ...] = ()
    image: Path | None = None
    truth: Path | None = None
    segment_size: int | None = DEFAULT_SEGMENT_SIZE
    cvvdp: str | None = None

    def __post_init__(self) -> None:
        if not self.videos:
            msg = "there is no video to judge; give at least one file"
            raise InvalidInputError(msg, param="videos", value=self.videos)
        if self.segment_size is not None and self.segment_size < 2:
            msg = f"segment size {self.segment_size} has borders everywhere; use at least 2, or auto"
            raise InvalidInputError(msg, param="segment_size", value=self.segment_size)
        if self.cvvdp is not None and self.truth is None:
            msg = "ColorVideoVDP compares with the true video; give --truth, or leave --cvvdp out"
            raise InvalidInputError(msg, param="truth")


def evaluate_videos(request: EvaluationRequest, *, on_progress: OnProgress | None = None) -> Evaluation:
    """Judge videos by every measure that can be computed, and a still picture beside them.

    Raises:
        VideoInputError: a video or the truth is missing, damaged, too small or, the truth, smaller than the video.
        ImageInputError: the image is missing or unreadable.
        InvalidInputError: ColorVideoVDP is asked for, and cannot be run.
        MemoryBudgetError: ColorVideoVDP runs out of memory.
    """
    image = None if request.image is None else load_image(request.image)
    paths = (*request.videos, *request.against)
    sources = _open_all(paths)
    first = sources[0]
    standard = Standard(segment_size=request.segment_size)
    if request.truth is not None:
        truth = open_truth(request.truth, size=first.size, fps=first.fps)
        standard = replace(standard, truth=truth, vmaf=open_vmaf(first.size))
    if request.cvvdp is not None:
        standard = replace(standard, colorvideovdp=open_colorvideovdp(request.cvvdp))
    image_notes: tuple[str, ...] = ()
    if image is not None:
        standard = replace(standard, image=np.asarray(fit_image(image.image, first.size)))
        image_notes = _image_notes(image.image.size, first.size, (*image.notes, *fit_notes(image.image, first.size)))

    results = [_judge(source, standard, on_progress) for source in sources]
    results[0] = replace(results[0], notes=(*results[0].notes, *image_notes, *_truth_notes(standard)))
    still = _still_control(first, standard, num_frames=results[0].num_frames)
    results.append(_judge(still, standard, on_progress))
    return Evaluation(
        tuple(results),
        metrics_of(name for result in results for name in result.values),
        image=None if request.image is None else str(request.image),
        truth=None if request.truth is None else str(request.truth),
        settings=_settings(request, standard, first),
    )


def unique_labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a short name for each file: its stem, with its folder's or a number where stems are the same."""
    labels: list[str] = []
    stems = [path.stem for path in paths]
    for path in paths:
        label = path.stem if stems.count(path.stem) == 1 else f"{path.absolute().parent.name}/{path.stem}"
        taken = sum(known == label or known.startswith(f"{label} (") for known in (*labels, STILL_LABEL))
        labels.append(f"{label} ({taken + 1})" if taken else label)
    return tuple(labels)


def _open_all(paths: Sequence[Path]) -> list[FrameSource]:
    """Open the files before the first of them is judged, so that a bad one is told at once."""
    labels = unique_labels(paths)
    first = open_video(paths[0], label=labels[0])
    others = [open_video(path, label=label, size=first.size) for path, label in zip(paths[1:], labels[1:], strict=True)]
    return [first, *(_with_rate_note(other, first) for other in others)]


def _with_rate_note(source: FrameSource, first: FrameSource) -> FrameSource:
    if abs(source.fps / first.fps - 1) < 0.01:
        return source
    note = f"it has {source.fps:g} frames per second, {first.label} {first.fps:g}: compare no measure per frame"
    return replace(source, notes=(*source.notes, note))


def _judge(source: FrameSource, standard: Standard, on_progress: OnProgress | None) -> VideoResult:
    def on_frame(done: int, total: int | None) -> None:
        if on_progress is not None:
            on_progress(source.label, done, total)

    return judge_video(source, standard, on_frame=on_frame)


def _still_control(first: FrameSource, standard: Standard, *, num_frames: int) -> FrameSource:
    if standard.image is not None:
        picture, origin = standard.image, "the image"
    else:
        picture, origin = first_frame(first), f"frame 0 of {first.label}"
    notes = (f"a control: {origin} repeated, to show what a video without motion would score",)
    return still_video(picture, label=STILL_LABEL, fps=first.fps, num_frames=num_frames, notes=notes)


def _image_notes(own: tuple[int, int], size: Size, notes: Sequence[str]) -> tuple[str, ...]:
    fitting = () if own == tuple(size) else (f"fitted from {Size(*own)} to {size}",)
    return tuple(f"image: {note}" for note in (*fitting, *notes))


def _truth_notes(standard: Standard) -> tuple[str, ...]:
    if standard.truth is None:
        return ()
    missing = () if standard.vmaf is not None else (VMAF_MISSING,)
    return (*(f"truth: {note}" for note in standard.truth.notes), *missing)


def _settings(request: EvaluationRequest, standard: Standard, first: FrameSource) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "size": str(first.size),
        "segment_size": "auto" if request.segment_size is None else request.segment_size,
        "optical_flow": f"{FLOW}, long side at most {FLOW_LONG_SIDE} px between neighboring frames",
        "against": [path.name for path in request.against],
        "versions": {"swifti2v": __version__} | dict(_versions()),
    }
    if standard.colorvideovdp is not None:
        settings["colorvideovdp"] = standard.colorvideovdp.conditions
    return settings


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield package, version(package)
