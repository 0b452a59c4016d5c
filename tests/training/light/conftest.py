"""An index of one clip to train on, one to validate with, and one photograph."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from swifti2v.geometry import Size
from swifti2v.light.network import LightConfig
from swifti2v.media.video_writer import VideoWriter
from swifti2v.training.light.pairs import PairOptions
from swifti2v.training.light.run import LightRun

EXAMPLE = next((Path(__file__).parents[3] / "examples").glob("*.jpg"))


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light_data")
    picture = PIL.Image.open(EXAMPLE).convert("RGB").resize((720, 405), PIL.Image.Resampling.LANCZOS)
    picture.save(folder / "photo.png")
    pixels = cv2.resize(np.asarray(picture), (256, 144), interpolation=cv2.INTER_AREA)
    for name, step in (("clip", 2), ("held", 3)):
        with VideoWriter(folder / f"{name}.mp4", size=Size(160, 96), fps=24) as writer:
            writer.write(np.stack([pixels[20:116, step * t : step * t + 160] for t in range(18)]))
    lines = ["clip.mp4,clip,160,a clip,A", "held.mp4,clip,160,another,A", "photo.png,photo,720,a lake,A"]
    refused = ["photo.png,photo,720,a lake,B", "clip.mp4,clip,4000,wide,A"]
    (folder / "INDEX.csv").write_text("\n".join(["file,kind,width,caption,licence_tier", *lines, *refused]))
    return folder / "INDEX.csv"


@pytest.fixture(scope="session")
def recipe() -> LightRun:
    return LightRun(
        num_steps=3,
        warmup_steps=1,
        batch_size=2,
        crop=16,
        length=4,
        spectral=0.1,
        checkpoint_every=100,
        log_every=1,
        network=LightConfig(width=8, deep_width=8, deep_blocks=1, hidden=4, join_width=8),
        pairs=PairOptions(validation=("held",), variants=2),
    )
