"""The report page of an evaluation: table, videos side by side, curves, crops, definitions, in one HTML file."""

from __future__ import annotations

import base64
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cv2
import numpy as np

from swifti2v.errors import OutputError
from swifti2v.evaluation.report_figures import IMAGE_LABEL, SERIES_COLORS, encode_picture, make_crops, make_plots
from swifti2v.evaluation.sources import open_truth, open_video
from swifti2v.evaluation.tables import BETTER, DASH, heading, setting_text, table_row
from swifti2v.geometry import Size
from swifti2v.media.atomic_files import make_folder, write_atomically
from swifti2v.media.images import fit_image, load_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.evaluation.report_figures import Array, Picture
    from swifti2v.evaluation.results import Evaluation
    from swifti2v.evaluation.sources import FrameSource

FILE_NAME, MEDIA_FOLDER = "report.html", "media"
THUMBNAIL_WIDTH = 440
EMBED_LIMIT_BYTES = 60_000_000
"""Videos of this much together go into the page; more would make browsers slow to open it."""

# Matroska is played by some browsers only; MP4's name makes those that can read QuickTime files try.
_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}


def write_report(evaluation: Evaluation, folder: Path, *, embed_limit_bytes: int = EMBED_LIMIT_BYTES) -> Path:
    """Write ``report.html`` into `folder` (made if missing) and return its path.

    The page asks the network for nothing. Videos of up to `embed_limit_bytes` together are held in the page; larger
    ones are copied into ``folder/media``, so that the folder can be moved. An older report is replaced only
    when the new one is whole.

    Raises:
        VideoInputError: a video is missing, truncated or damaged.
        ImageInputError: the image is missing or unreadable.
        OutputError: matplotlib or jinja2 is not installed, or a file cannot be written.
    """
    template = _template()
    sources = tuple(_sources(evaluation))
    image = None
    if evaluation.image is not None and sources:
        image = np.asarray(fit_image(load_image(evaluation.image).image, sources[0].size))
    embedded = sum(_path(source).stat().st_size for source in sources) <= embed_limit_bytes
    page = template.render(
        evaluation=evaluation,
        series={video.label: index % len(SERIES_COLORS) + 1 for index, video in enumerate(evaluation.videos)},
        image=None if image is None else _thumbnail(image),
        file_name=lambda path: Path(path).name,
        rows=[(metric, heading(metric), table_row(metric, evaluation.videos)) for metric in evaluation.metrics],
        better={name: words for name, (_sign, words) in BETTER.items()},
        dash=DASH,
        plots=make_plots(evaluation),
        crops=make_crops(sources, image),
        players=[
            (source.label, _address(index, source, folder, embedded=embedded)) for index, source in enumerate(sources)
        ],
        embedded=embedded,
        fps=sources[0].fps if sources else 0,
        settings=[(str(name), setting_text(value)) for name, value in evaluation.settings.items()],
    )
    make_folder(folder)
    write_atomically(folder / FILE_NAME, page.encode())
    return folder / FILE_NAME


def _sources(evaluation: Evaluation) -> Iterator[FrameSource]:
    """Yield the videos that have a file, as they were judged, then the truth unless it is one of them."""
    shown = [video for video in evaluation.videos if video.path is not None]
    for video in shown:
        size = Size(video.width, video.height)
        source = open_video(Path(video.path or ""), label=video.label, size=size, fps=video.fps)
        yield replace(source, num_frames=video.num_frames)
    if evaluation.truth is not None and shown and evaluation.truth not in [video.path for video in shown]:
        first = shown[0]
        truth = open_truth(Path(evaluation.truth), size=Size(first.width, first.height), fps=first.fps)
        yield replace(truth, num_frames=first.num_frames)


def _thumbnail(image: Array) -> Picture:
    scale = min(1.0, THUMBNAIL_WIDTH / image.shape[1])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return encode_picture(np.asarray(small), IMAGE_LABEL, "The input image")


def _path(source: FrameSource) -> Path:
    return Path(source.path or "")


def _address(index: int, source: FrameSource, folder: Path, *, embedded: bool) -> str | None:
    """Return a video as a data URI, or the address of its copy beside the page; None if browsers cannot play it."""
    path = _path(source)
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        return None
    if embedded:
        return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
    make_folder(folder / MEDIA_FOLDER)
    target = folder / MEDIA_FOLDER / f"{index}_{path.name}"
    with path.open("rb") as video:
        write_atomically(target, lambda file: shutil.copyfileobj(video, file))
    return f"{MEDIA_FOLDER}/{quote(target.name)}"


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        msg = "a report needs jinja2, which is not installed; run: pip install 'swifti2v[evaluate]'"
        raise OutputError(msg) from error
    assets = resources.files("swifti2v.evaluation") / "assets"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name, file in (("style", "report.css"), ("script", "report.js")):
        environment.globals[name] = (assets / file).read_text(encoding="utf-8")
    return environment.from_string((assets / "report.html.jinja").read_text(encoding="utf-8"))
