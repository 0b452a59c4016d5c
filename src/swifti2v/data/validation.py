"""Which videos can be trained on: each is read once, frame by frame, and is accepted or gets a reason.

What reading a video shows depends on its file and the options alone, so that it can be kept (`checked_videos.py`) and
shared; which videos are copies of others is found out of what all of them have shown.

Frames pass by at the rate of training (`media/video_reader.py`, by time stamp), so that what is found here is counted
in the frames that `clips.py` will cut. Whatever a file does to its decoder costs that file and never the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from swifti2v.data.description import content_key, file_stamp
from swifti2v.data.prefetch import prefetched
from swifti2v.data.report import Report, Scene, Skipped
from swifti2v.data.scenes import SceneSpan, SceneThresholds, find_scenes
from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.media.video_reader import VideoReader

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.data.manifest import ManifestEntry

_FRAME_RATE_MARGIN = 0.9


@dataclass(frozen=True)
class ValidationOptions:
    """What a video must be.

    Args:
        fps: rate of training; frames are counted at it.
        min_frames: least length of a piece, at `fps`.
        min_short_side_pixels: least width and height.
        min_source_fps: least rate of the file; default: nine tenths of `fps`, below which frames would be repeated.
        cuts: `split` takes the pieces between cuts, `skip` leaves out videos with cuts, `ignore` looks for none.
        thresholds: what counts as a cut.
        static_level: a piece that moves less is static, in the levels of `SceneSpan.motion`; 0 takes still videos.
        find_copies: leave out files of equal content.
    """

    fps: float = 16.0
    min_frames: int = 81
    min_short_side_pixels: int = 128
    min_source_fps: float | None = None
    cuts: Literal["split", "skip", "ignore"] = "split"
    thresholds: SceneThresholds = field(default_factory=SceneThresholds)
    static_level: float = 4.0
    find_copies: bool = True

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` for a rate or length that is not positive, or another policy for cuts."""
        if not (0 < self.fps <= 1000 and self.min_frames >= 1):
            msg = f"fps {self.fps} and min_frames {self.min_frames} must be above 0"
            raise InvalidInputError(msg)
        if self.cuts not in ("split", "skip", "ignore"):
            msg = f"cuts is {self.cuts!r}; use split, skip or ignore"
            raise InvalidInputError(msg)


@dataclass(frozen=True)
class Verdict:
    """What became of one video: its usable scenes, and what was left out; never both empty."""

    scenes: tuple[Scene, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class CheckedVideo:
    """What reading one video has shown.

    Args:
        name: of its entry in the manifest.
        stamp: of the file, from before it was read; "" if there was none.
        content: equal for copies of one file; "" if it cannot be read.
        verdict: without regard to copies.
    """

    name: str
    stamp: str
    content: str
    verdict: Verdict


OnVideo = Callable[[int, int], None]
"""Called after each video with the number done and the number of all."""


def validate_videos(
    entries: Sequence[ManifestEntry],
    options: ValidationOptions,
    *,
    num_threads: int = 1,
    on_video: OnVideo | None = None,
) -> Report:
    """Read every video and say what can be used of it; the outcome does not depend on `num_threads`."""
    videos = check_videos(entries, options, num_threads=num_threads, on_video=on_video)
    return report_of(entries, {video.name: video for video in videos}, options)


def check_videos(
    entries: Sequence[ManifestEntry],
    options: ValidationOptions,
    *,
    num_threads: int = 1,
    on_video: OnVideo | None = None,
) -> Iterator[CheckedVideo]:
    """Read videos, and yield what each has shown, as they come."""

    def job(entry: ManifestEntry) -> Generator[CheckedVideo, None, None]:
        # The stamp comes first: a file that changes while it is read is read again.
        stamp, content = _stamp_and_content(entry.path)
        yield CheckedVideo(entry.name, stamp, content, check_video(entry, options))

    with closing(prefetched((partial(job, entry) for entry in entries), num_threads=num_threads)) as videos:
        for done, video in enumerate(videos, start=1):
            yield video
            if on_video is not None:
                on_video(done, len(entries))


def report_of(
    entries: Sequence[ManifestEntry], videos: Mapping[str, CheckedVideo], options: ValidationOptions
) -> Report:
    """Put together what all videos have shown, in the order of `entries`.

    Args:
        entries: of the manifest.
        videos: one for each entry, by its name.
        options: with which they were checked.
    """
    originals: dict[str, str] = {}
    verdicts: list[Verdict] = []
    for entry in entries:
        video = videos[entry.name]
        original = originals.setdefault(video.content, entry.name) if options.find_copies and video.content else ""
        if original in ("", entry.name):
            verdicts.append(video.verdict)
        else:
            verdicts.append(_refused(Skipped(entry.name, "copy of another", f"has the content of {original}")))
    return Report(
        fps=options.fps,
        scenes=tuple(scene for verdict in verdicts for scene in verdict.scenes),
        skipped=tuple(item for verdict in verdicts for item in verdict.skipped),
    )


def check_video(entry: ManifestEntry, options: ValidationOptions) -> Verdict:
    """Read one video to its end; whatever is wrong with it becomes a reason, nothing an exception."""
    try:
        reader = VideoReader(entry.path, fps=options.fps)
    except Exception as error:  # noqa: BLE001 - decoders raise what they like on damaged files; the run goes on
        return _refused(Skipped(entry.name, "unreadable", _one_line(error)))
    problem = _header_problem(entry.name, reader, options)
    if problem is not None:
        return _refused(problem)
    try:
        spans = list(_spans(reader, options))
    except Exception as error:  # noqa: BLE001 - as above; half a video is not used either, its end is unknown
        return _refused(Skipped(entry.name, "damaged", _one_line(error)))
    return _judge(entry, reader, spans, options)


def _stamp_and_content(path: Path) -> tuple[str, str]:
    try:
        return file_stamp(path), content_key(path)
    except OSError:
        return "", ""  # reading it will say why


def _header_problem(name: str, reader: VideoReader, options: ValidationOptions) -> Skipped | None:
    """What the header alone rules out."""
    info = reader.info
    if min(info.size) < options.min_short_side_pixels:
        least = options.min_short_side_pixels
        return Skipped(name, "too small", f"is {info.size}; the shorter side must have {least} pixels")
    least_fps = _FRAME_RATE_MARGIN * options.fps if options.min_source_fps is None else options.min_source_fps
    if info.fps < least_fps:
        return Skipped(name, "low frame rate", f"has {info.fps:.3f} frames per second; {least_fps:.3f} are needed")
    return None


def _spans(reader: VideoReader, options: ValidationOptions) -> Iterator[SceneSpan]:
    thresholds = options.thresholds
    if options.cuts == "ignore":
        thresholds = SceneThresholds(cut_score=float("inf"), cut_ratio=thresholds.cut_ratio)
    return find_scenes(reader.frames(), thresholds)


def _judge(
    entry: ManifestEntry, reader: VideoReader, spans: Sequence[SceneSpan], options: ValidationOptions
) -> Verdict:
    if options.cuts == "skip" and len(spans) > 1:
        first_cut = spans[1].first_frame / options.fps
        detail = f"has {len(spans) - 1} cuts, the first at {first_cut:.2f} s"
        return _refused(Skipped(entry.name, "scene cut", detail))
    scenes: list[Scene] = []
    skipped: list[Skipped] = []
    for span in spans:
        last = span.first_frame + span.num_frames
        name = entry.name if len(spans) == 1 else f"{entry.name}[{span.first_frame}:{last}]"
        if span.num_frames < options.min_frames:
            detail = f"has {span.num_frames} frames at {options.fps:g} per second; {options.min_frames} are needed"
            skipped.append(Skipped(name, "too short", detail))
        elif span.motion < options.static_level:
            detail = f"moves by {span.motion:.1f} levels; {options.static_level:g} are needed"
            skipped.append(Skipped(name, "static", detail))
        else:
            size, motion = reader.info.size, span.motion
            scenes.append(Scene(entry.name, entry.path, entry.prompt, size, span.first_frame, span.num_frames, motion))
    return Verdict(tuple(scenes), tuple(skipped))


def _refused(item: Skipped) -> Verdict:
    return Verdict((), (item,))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, VideoInputError) else f"{type(error).__name__}: {text}"
