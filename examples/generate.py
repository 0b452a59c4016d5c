"""One picture becomes a video, in the manner of diffusers.

    python examples/generate.py examples/lake-sherburne.jpg lake.mp4
    python examples/generate.py photo.jpg video.mp4 --model wan2.2 --size 2560x1408 --prompt "the camera pans left"

The embedded model `mini` needs no download and no card; its videos show how the system works, not how good it gets.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from swifti2v import Size, SwiftI2VError, TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.pipelines.runs import Progress


def main(arguments: Sequence[str] | None = None) -> Path:
    """Make the video that the arguments ask for, and return its path."""
    asked = _parser().parse_args(arguments)
    pipe = TwoStagePipeline.from_pretrained(asked.model)
    video = pipe(asked.image, asked.prompt, size=asked.size, num_frames=asked.frames, seed=asked.seed, on_progress=show)
    for note in video.notes:
        sys.stderr.write(f"\nnote: {note}")
    sys.stderr.write("\n")
    return video.save(asked.output)


def show(progress: Progress) -> None:
    """Write one line that says how far the run is, over the last one."""
    segment = f" (segment {progress.segment} of {progress.num_segments})" if progress.num_segments else ""
    sys.stderr.write(f"\r{progress.phase}: {progress.done} of {progress.total}{segment}    ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One picture becomes a video.")
    parser.add_argument("image", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=Size.parse, default=Size(640, 352))
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    try:
        main()
    except SwiftI2VError as error:
        sys.exit(f"error: {error}")
