"""`swifti2v refine`: a video that exists already, at high resolution with the detail of the photo it was made from."""

from __future__ import annotations

import csv
import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.generate import DeviceOption, JsonOption, WorkDirOption, phase_bars
from swifti2v.errors import InvalidInputError, SwiftI2VError

if TYPE_CHECKING:
    from swifti2v.runner.refine import VideoRefiner


def refine(
    motion: Annotated[Path, typer.Argument(help="The video, of any model; or a CSV with columns motion,image,output.")],
    *,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="The photo that the video was made from.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The video to write: .mp4, .mov or .mkv.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Output size, WIDTHxHEIGHT. Default: what the photo holds, at most 2560x1408.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Use no more frames of the video.")] = None,
    work_dir: WorkDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refine a video: the same motion, with the detail of its photo. No Stage I is loaded or run."""
    from swifti2v.runner.refine import VideoRefiner

    refiner = VideoRefiner(device)
    if motion.suffix.lower() == ".csv":
        _refine_list(refiner, motion, size=size, frames=frames, as_json=as_json)
        return
    if image is None or output is None:
        missing = "--image" if image is None else "--output"
        msg = f"{missing} is missing; give the photo and the file to write: --image photo.jpg --output refined.mp4"
        raise InvalidInputError(msg, param=missing.removeprefix("--"))
    _Refinement(refiner, motion, image, output, size, frames, as_json).run(work_dir)


@dataclass(frozen=True)
class _Refinement:
    """One video to refine, and how it is told."""

    refiner: VideoRefiner
    motion: Path
    image: Path
    output: Path
    size: str | None
    max_frames: int | None
    as_json: bool

    def run(self, work_dir: Path | None = None) -> None:
        """Align, refine, write, and say what was done."""
        from swifti2v.media.video_writer import VideoWriter, check_output_path

        check_output_path(self.output)
        started = time.monotonic()
        request = self.refiner.request(self.motion, self.image, size=self.size, max_frames=self.max_frames)
        for note in request.notes:
            if not self.as_json:
                typer.echo(f"note: {note}", err=True)
        with (
            phase_bars(quiet=self.as_json) as on_progress,
            closing(self.refiner.stream(request, work_dir=work_dir, on_progress=on_progress)) as pieces,
            VideoWriter(self.output, size=request.size, fps=request.fps) as writer,
        ):
            for piece in pieces:
                writer.write(piece.frames)
        summary: dict[str, Any] = {
            "output": str(self.output),
            "size": str(request.size),
            "num_frames": request.num_frames,
            "fps": request.fps,
            "seconds": round(time.monotonic() - started, 2),
            "notes": list(request.notes),
        }
        words = f"{self.output}: {request.num_frames} frames of {request.size}, {summary['seconds']} s"
        typer.echo(json.dumps(summary) if self.as_json else words)


def _refine_list(refiner: VideoRefiner, path: Path, *, size: str | None, frames: int | None, as_json: bool) -> None:
    """Refine each line of a CSV whose output is not there yet; go on after a line that cannot be refined."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} cannot be read as CSV ({error}); give a text file with the columns motion,image,output"
        raise InvalidInputError(msg, param="motion", value=str(path)) from error
    if not lines or not {"motion", "image", "output"} <= lines[0].keys():
        msg = f"{path} has no columns motion,image,output; its first line must name them"
        raise InvalidInputError(msg, param="motion", value=str(path))
    failed = 0
    for line in lines:
        motion, image, output = (path.parent / line[name] for name in ("motion", "image", "output"))
        if output.exists():
            continue
        try:
            _Refinement(refiner, motion, image, output, size, frames, as_json).run()
        except SwiftI2VError as error:
            failed += 1
            typer.echo(f"error: {motion}: {error}", err=True)
    if failed:
        msg = f"{failed} of {len(lines)} videos were not refined; mend those lines and run the same command again"
        raise InvalidInputError(msg, param="motion", value=failed)
