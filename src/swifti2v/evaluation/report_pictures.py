"""Pictures of a report: contact sheets, crops where videos differ most, slices through time.

All videos are read side by side, each of them once; in memory are one frame of each and the small pictures.
"""

from __future__ import annotations

import base64
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from swifti2v.evaluation.motion import luma
from swifti2v.evaluation.sources import fitted, open_truth, open_video
from swifti2v.geometry import Size
from swifti2v.media.images import fit_image, load_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from swifti2v.evaluation.results import Evaluation, VideoResult
    from swifti2v.evaluation.sources import FrameSource

Array = np.ndarray[Any, Any]

SHEET_FRAMES = 6
"""Frames of a contact sheet."""

IMAGE_LABEL = "input image"

_THUMBNAIL_WIDTH, _SLICE_WIDTH, _SLICE_HEIGHT = 440, 1280, 240
_CROPS_AFTER_FIRST = 3
_SMALLEST_CROP, _LARGEST_CROP = 32, 192
_DIFFERENCE_WIDTH = 320  # of the map in which the largest difference is looked for
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """A picture ready for a page.

    Args:
        label: what stands below it.
        alt: what it shows, for those who do not see it.
        uri: the file itself as a data URI.
        width, height: in pixels.
    """

    label: str
    alt: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class CropRow:
    """The same place of the same frame in every video, pixel for pixel.

    Args:
        frame: index of the frame.
        left, top, side: the square in pixels of the first video.
        compared: the two between which the difference is largest there.
        difference: between these two, mean absolute over the square and the channels, 0 .. 255.
        pictures: the crop of each video, then of the truth, then (frame 0) of the image.
    """

    frame: int
    left: int
    top: int
    side: int
    compared: tuple[str, ...]
    difference: float
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class VideoPictures:
    """Pictures of one video: its contact sheet, and the row at the relative height `row` over time."""

    label: str
    sheet: tuple[Picture, ...]
    time_slice: Picture


@dataclass(frozen=True)
class ReportPictures:
    """All pictures of a report.

    Args:
        image: the input image cut to the first video's size, if there was one.
        videos: those of the evaluation that have a file, then the truth.
        crops: in the order of time.
        slice_height: height of the row that the slices show, 0 (top) .. 1.
    """

    image: Picture | None = None
    videos: tuple[VideoPictures, ...] = ()
    crops: tuple[CropRow, ...] = ()
    slice_height: float = 0.5


def video_sources(evaluation: Evaluation) -> tuple[FrameSource, ...]:
    """Return what can be shown, as it was judged: videos that have a file, then the truth.

    Raises:
        VideoInputError: a video is missing, truncated in its header, or not a video; the truth is smaller than a video.
    """
    sources = [_opened(video, video.path) for video in evaluation.videos if video.path is not None]
    if sources and evaluation.truth is not None and evaluation.truth not in [source.path for source in sources]:
        truth = open_truth(Path(evaluation.truth), size=sources[0].size, fps=sources[0].fps)
        sources.append(replace(truth, num_frames=max(_length(source) for source in sources)))
    return tuple(sources)


def make_pictures(evaluation: Evaluation) -> ReportPictures:
    """Read every video once and return the pictures of a report; none where no video has a file.

    Raises:
        VideoInputError: a video is missing, truncated or damaged.
        ImageInputError: the image is missing or unreadable.
    """
    sources = video_sources(evaluation)
    if not sources:
        return ReportPictures()
    image = None
    if evaluation.image is not None:
        image = np.asarray(fit_image(load_image(evaluation.image).image, sources[0].size))
    with ExitStack() as stack:
        readers = [islice(stack.enter_context(closing(source.frames())), _length(source)) for source in sources]
        albums = tuple(_Album(source) for source in sources)
        search = _CropSearch(sources, image)
        height = 0.5
        for index, frames in enumerate(zip_longest(*readers)):
            if index == 0:
                height = _most_detailed_height(frames[0])
            for album, frame in zip(albums, frames, strict=True):
                if frame is not None:
                    album.add(index, frame, height)
            search.add(index, frames)
    return ReportPictures(
        image=None if image is None else _thumbnail(image, IMAGE_LABEL, "The input image"),
        videos=tuple(album.pictures() for album in albums if album.rows),
        crops=tuple(search.rows()),
        slice_height=height,
    )


def largest_difference(
    first: Array, second: Array, *, side: int, taken: Sequence[tuple[int, int]] = ()
) -> tuple[float, int, int]:
    """Return ``(mean difference, left, top)`` of the square of `side` pixels in which two frames differ most.

    Both are uint8 [H, W, 3] of one size; the difference is the mean absolute one over the channels, 0 .. 255, looked
    for on a map at most 320 pixels wide. Squares that overlap one at `taken` (left, top) are left out unless nothing
    else remains.
    """
    height, width = first.shape[:2]
    scale = min(1.0, _DIFFERENCE_WIDTH / width)
    small = Size(max(1, round(width * scale)), max(1, round(height * scale)))
    difference = cv2.absdiff(first, second).mean(axis=-1, dtype=np.float32)
    difference = cv2.resize(difference, small, interpolation=cv2.INTER_AREA)
    window = max(1, min(round(side * scale), *small))
    sums = cv2.boxFilter(difference, -1, (window, window), anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    scores = sums[: small.height - window + 1, : small.width - window + 1].copy()
    free = scores.copy()
    for left, top in taken:
        rows, columns = (
            slice(max(0, round(place * scale) - window + 1), round(place * scale) + window) for place in (top, left)
        )
        free[rows, columns] = -1
    if free.max() >= 0:
        scores = free
    y, x = np.unravel_index(int(scores.argmax()), scores.shape)
    left, top = (min(round(int(place) / scale), limit - side) for place, limit in ((x, width), (y, height)))
    return float(scores[y, x]), left, top


@dataclass
class _Album:
    """What is kept of a video while it passes."""

    source: FrameSource
    sheet: list[Picture] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chosen = sheet_frames(_length(self.source))

    def add(self, index: int, frame: Array, height: float) -> None:
        row = frame[min(int(height * len(frame)), len(frame) - 1)][None]
        self.rows.append(_narrowed(row, _SLICE_WIDTH, keep_height=True))
        if index in self.chosen:
            self.sheet.append(_thumbnail(frame, f"frame {index}", f"{self.source.label}, frame {index}"))

    def pictures(self) -> VideoPictures:
        alt = f"{self.source.label}: one row of pixels over {len(self.rows)} frames, time runs downwards"
        slices = np.concatenate(self.rows)
        times = max(1, round(_SLICE_HEIGHT / len(slices)))
        time_slice = encode_picture(np.repeat(slices, times, axis=0), self.source.label, alt, lossless=True)
        return VideoPictures(self.source.label, tuple(self.sheet), time_slice)


@dataclass(frozen=True)
class _Candidate:
    """A crop before it is encoded."""

    frame: int
    compared: tuple[str, ...]
    difference: float
    place: tuple[int, int]
    crops: tuple[tuple[str, Array], ...]


class _CropSearch:
    """The place of largest difference in frame 0 and in each of a few stretches of time after it."""

    def __init__(self, sources: tuple[FrameSource, ...], image: Array | None) -> None:
        self._labels = [source.label for source in sources]
        self._image = image
        self._size = sources[0].size
        self._side = min(max(_SMALLEST_CROP, min(self._size) // 4), _LARGEST_CROP, *self._size)
        last = min(_length(source) for source in sources[:2]) - 1
        self._ends = [0, *(round(last * part / _CROPS_AFTER_FIRST) for part in range(1, _CROPS_AFTER_FIRST + 1))]
        self._best: dict[int, _Candidate] = {}

    def add(self, index: int, frames: Sequence[Array | None]) -> None:
        pair = self._pair(index, frames)
        stretch = next((number for number, end in enumerate(self._ends) if index <= end), None)
        if pair is None or stretch is None:
            return
        taken = [best.place for number, best in self._best.items() if number != stretch]
        compared, (first, second) = pair
        difference, left, top = largest_difference(first, second, side=self._side, taken=taken)
        if stretch not in self._best or difference > self._best[stretch].difference:
            crops = tuple(self._crops(index, frames, left, top))
            self._best[stretch] = _Candidate(index, compared, difference, (left, top), crops)

    def rows(self) -> Iterator[CropRow]:
        for best in self._best.values():
            left, top = best.place
            where = f"frame {best.frame}: {self._side} pixels square from x {left}, y {top}"
            pictures = tuple(
                encode_picture(crop, label, f"{label}, {where}", lossless=True) for label, crop in best.crops
            )
            yield CropRow(best.frame, left, top, self._side, best.compared, best.difference, pictures)

    def _pair(self, index: int, frames: Sequence[Array | None]) -> tuple[tuple[str, ...], tuple[Array, Array]] | None:
        first = frames[0]
        if first is None:
            return None
        if len(frames) > 1:
            second = frames[1]
            return None if second is None else (tuple(self._labels[:2]), (first, fitted(second, self._size)))
        if index == 0 and self._image is not None:
            return (self._labels[0], IMAGE_LABEL), (first, self._image)
        return None

    def _crops(self, index: int, frames: Sequence[Array | None], left: int, top: int) -> Iterator[tuple[str, Array]]:
        image = [(IMAGE_LABEL, self._image)] if index == 0 else []
        for label, frame in (*zip(self._labels, frames, strict=True), *image):
            if frame is not None:
                # A copy: a view would keep the whole frame in memory.
                yield label, fitted(frame, self._size)[top : top + self._side, left : left + self._side].copy()


def sheet_frames(num_frames: int) -> tuple[int, ...]:
    """Return the indices of a contact sheet: the first frame, the last, and evenly between them."""
    return tuple(sorted({round(float(index)) for index in np.linspace(0, num_frames - 1, SHEET_FRAMES)}))


def encode_picture(frame: Array, label: str, alt: str, *, lossless: bool) -> Picture:
    """Return uint8 RGB [H, W, 3] as a PNG (`lossless`) or JPEG."""
    extension, kind, options = (
        (".png", "png", [cv2.IMWRITE_PNG_COMPRESSION, 9])
        if lossless
        else (".jpg", "jpeg", [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    )
    _, data = cv2.imencode(extension, cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR), options)
    uri = f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
    return Picture(label, alt, uri, frame.shape[1], frame.shape[0])


def _opened(video: VideoResult, path: str) -> FrameSource:
    source = open_video(Path(path), label=video.label, size=Size(video.width, video.height), fps=video.fps)
    return replace(source, num_frames=video.num_frames)


def _length(source: FrameSource) -> int:
    return source.num_frames or 0


def _thumbnail(frame: Array, label: str, alt: str) -> Picture:
    return encode_picture(_narrowed(frame, _THUMBNAIL_WIDTH), label, alt, lossless=False)


def _narrowed(frame: Array, width: int, *, keep_height: bool = False) -> Array:
    if frame.shape[1] <= width:
        return frame
    height = frame.shape[0] if keep_height else max(1, round(frame.shape[0] * width / frame.shape[1]))
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))


def _most_detailed_height(frame: Array) -> float:
    """Return the relative height of the row with the strongest vertical edges: there motion draws the clearest lines.

    Rows near the upper and lower border (10%) are left out.
    """
    change = np.abs(np.diff(luma(frame), axis=1)).mean(axis=1)
    smooth = np.asarray(cv2.blur(change[:, None], (1, max(1, len(change) // 20)))).ravel()
    margin = len(smooth) // 10
    row = margin + int(smooth[margin : len(smooth) - margin].argmax())
    return (row + 0.5) / len(smooth)
