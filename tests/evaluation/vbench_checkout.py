"""A small stand-in for a checkout of VBench: its files, pictures, and an evaluator that behaves like the real one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUBJECT = ["i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"]
SUBJECT += ["imaging_quality", "temporal_flickering"]
BACKGROUND = ["i2v_background", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_flickering"]

ORIGIN = (480, 400)
BOXES = {"1-1": [80, 40, 300, 300], "8-5": [40, 60, 320, 200], "7-4": [40, 60, 315, 180], "16-9": [40, 60, 320, 180]}

# The row of MAGI-1 on the leaderboard: see PUBLISHED of test_vbench_total.
MAGI_ONE = {
    "i2v_subject": 0.9839,
    "i2v_background": 0.9900,
    "camera_motion": 0.5085,
    "subject_consistency": 0.9396,
    "background_consistency": 0.9674,
    "motion_smoothness": 0.9868,
    "dynamic_degree": 0.6821,
    "aesthetic_quality": 0.6474,
    "imaging_quality": 0.6971,
}

PROMPTS = [
    ("a bear in the water", "animal", SUBJECT),
    ("a beach at dusk", "scenery", BACKGROUND),
    ("a beach at dusk, camera pans left", "scenery", ["camera_motion"]),
]

# Stands before the installed torch on the path of the fake evaluator, so that no test waits for the real one.
TORCH = """
class device:
    def __init__(self, name):
        self.type = name
"""

EVALUATOR = """
import importlib, json, os
from pathlib import Path
SCORES = {scores}
CRASH = {crash!r}

class VBenchI2V:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.prompts, self.output = device, full_info_dir, output_path

    def evaluate(self, videos_path, name, dimension_list, resolution, local, **options):
        if CRASH:
            raise RuntimeError(CRASH)
        assert not isinstance(self.device, str), "motion_smoothness would depend on the memory of the card"
        results = {{}}
        names = os.listdir(videos_path)
        suffix = Path(names[0]).suffix
        for dimension in dimension_list:
            judged = []
            for entry in json.load(open(self.prompts)):
                if dimension in entry["dimension"]:
                    assert os.path.isfile("vbench2_beta_i2v/data/crop/" + resolution + "/" + entry["image_name"])
                    for index in range(5):
                        video = entry["prompt_en"] + "-" + str(index) + suffix
                        if video in names:
                            judged.append({{"video_path": os.path.join(videos_path, video), "video_results": 0.5}})
                        else:
                            print("WARNING!!! This required video is not found! " + video)
            middle = [{{"pan_left": 1.0, "static": float("nan")}}] if dimension == "camera_motion" else []
            results[dimension] = [SCORES[dimension], *middle, judged]
        print("calls", self.device.type, local, json.dumps(options))
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
"""


def coordinates(size: tuple[int, int] = ORIGIN) -> PIL.Image.Image:
    """A picture that tells where each of its pixels is: red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x * 255 / (size[0] - 1), y * 255 / (size[1] - 1), np.full_like(x, 128)], axis=-1)
    return PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_checkout(
    folder: Path,
    *,
    scores: Mapping[str, float] = MAGI_ONE,
    crash: str = "",
    pictures: bool = True,
) -> Path:
    """Write a checkout.

    Args:
        folder: made by this.
        scores: that its evaluator finds.
        crash: what its evaluator fails with, if not empty.
        pictures: with the originals and their boxes.
    """
    entries = [
        {"prompt_en": prompt, "image_name": f"{prompt.split(',')[0]}.jpg", "image_type": kind, "dimension": dimensions}
        for prompt, kind, dimensions in PROMPTS
    ]
    package = folder / "vbench2_beta_i2v"
    write_json(package / "vbench2_i2v_full_info.json", entries)
    (package / "third_party" / "cotracker").mkdir(parents=True)
    (package / "__init__.py").write_text(EVALUATOR.format(scores=dict(scores), crash=crash))
    for part in ("vbench", "torch"):
        (folder / part).mkdir()
        (folder / part / "__init__.py").write_text(TORCH if part == "torch" else "")
    if pictures:
        write_pictures(package / "data", {entry["image_name"] for entry in entries})
    return folder


def write_pictures(data: Path, names: set[str]) -> None:
    """Write originals and their boxes."""
    (data / "origin").mkdir(parents=True)
    for name in names:
        coordinates().save(data / "origin" / name, quality=100, subsampling=0)
    info = [
        {"file_name": name, "origin_width": ORIGIN[0], "origin_height": ORIGIN[1], "diff_ratio_crop": BOXES}
        for name in sorted(names)
    ]
    write_json(data / "i2v-bench-info.json", info)
