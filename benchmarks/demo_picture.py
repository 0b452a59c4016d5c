"""The picture at the head of the README, from a run that kept its work directory:

    swifti2v generate examples/lake-sherburne.jpg --model mini --prompt "The camera pans slowly to the right." \
        --size 1280x704 --frames 81 --output outputs/demo.mp4 --work-dir outputs/demo
    python -m benchmarks.demo_picture examples/lake-sherburne.jpg outputs/demo.mp4 --work-dir outputs/demo

Above: the photo, and the last frame of its video. Below, one place of that frame: in the photo it was made of, as
Stage I made it (its own pixels), in the paper's reference, and in the video. The place is the one that the video
and the paper's reference differ in most; nobody picks it.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks import pictures
from swifti2v.geometry import Size
from swifti2v.media.frame_store import FrameStore
from swifti2v.media.images import fit_image, load_image
from swifti2v.media.video_reader import VideoReader
from swifti2v.pixels import to_uint8
from swifti2v.reference.replace import to_unit
from swifti2v.reference.resample import upsample

if TYPE_CHECKING:
    from benchmarks.pictures import Array

FRAME_WIDTH = 640
CROP = Size(156, 88)
CROP_ENLARGEMENT = 2


def compare(image: Array, motion: Array, frame: Array, index: int) -> Array:
    """Return the sheet, uint8 [H, W, 3].

    Args:
        image: the photo at output size, uint8 [H, W, 3].
        motion: frame `index` of the motion reference, uint8 [h, w, 3].
        frame: the same of the video, uint8 [H, W, 3].
        index: its number.
    """
    height, width = image.shape[:2]
    enlarged = upsample(to_unit(torch.from_numpy(motion)), height, width, device=torch.device("cpu"))
    paper = to_uint8(enlarged[None, :, None])[0].numpy()
    coarse = _nearest(motion, height, width)
    place = pictures.most_different_place(frame, paper, CROP)
    source = pictures.followed(place, image, frame)
    above = (
        ("the photo", pictures.marked(image, source)),
        (f"frame {index} of the video", pictures.marked(frame, place)),
    )
    below = (
        ("the photo, there", source.of(image)),
        (f"frame {index}: Stage I, {motion.shape[1]}x{motion.shape[0]}", place.of(coarse)),
        ("the paper's reference", place.of(paper)),
        ("the video", place.of(frame)),
    )
    return pictures.sheet(
        [
            pictures.row([pictures.Panel(label, pictures.fitted(shown, FRAME_WIDTH)) for label, shown in above]),
            pictures.row([pictures.Panel(label, pictures.enlarged(shown, CROP_ENLARGEMENT)) for label, shown in below]),
        ]
    )


def _nearest(pixels: Array, height: int, width: int) -> Array:
    rows = (np.arange(height) + 0.5) * pixels.shape[0] / height
    columns = (np.arange(width) + 0.5) * pixels.shape[1] / width
    return pixels[rows.astype(int)][:, columns.astype(int)]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.jpg"))
    asked = parser.parse_args()
    reader = VideoReader(asked.video)
    last = reader.count_frames() - 1
    (frame,) = deque(reader.frames(), maxlen=1)
    height, width = frame.shape[:2]
    image = np.asarray(fit_image(load_image(asked.image).image, Size(width, height)))
    motion = FrameStore(asked.work_dir / "motion_reference").read(last, last + 1)[0]
    pictures.save(compare(image, motion, frame, last), asked.output)


if __name__ == "__main__":
    main()
