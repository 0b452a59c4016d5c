"""Videos judged together: one size, one standard, a still control, unique names; and the Markdown page of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import ImageInputError, InvalidInputError, VideoInputError
from swifti2v.evaluation.evaluate import STILL_LABEL, EvaluationRequest, evaluate_videos, unique_labels
from swifti2v.evaluation.registry import metrics_of
from swifti2v.evaluation.results import Evaluation, VideoResult
from swifti2v.evaluation.tables import markdown
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

HEIGHT, WIDTH = 64, 96


def panning(num_frames: int, *, width: int = WIDTH, height: int = HEIGHT, blur: float = 0.0) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((height, width + 2 * num_frames, 3)).astype(np.float32)
    coarse, fine = cv2.GaussianBlur(noise, (0, 0), 6), cv2.GaussianBlur(noise, (0, 0), 1.2)
    plane = 0.5 + 0.1 * coarse / coarse.std() + 0.04 * fine / fine.std()
    plane = cv2.GaussianBlur(plane, (0, 0), blur) if blur else plane
    pixels = (plane.clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack([pixels[:, 2 * t : 2 * t + width] for t in range(num_frames)])


def write(path: Path, frames: np.ndarray, *, fps: float = 10) -> Path:
    height, width = frames.shape[1:3]
    with VideoWriter(path, size=Size(width, height), fps=fps, crf=2, preset="ultrafast") as writer:
        writer.write(frames)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``clip`` of 7 frames, ``soft``: the same blurred, ``wide``: larger and faster, two pictures of the clip."""
    root = tmp_path_factory.mktemp("videos")
    frames = panning(7)
    write(root / "clip.mp4", frames)
    write(root / "soft.mp4", panning(7, blur=1.5))
    write(root / "wide.mp4", panning(7, width=128), fps=20)
    Image.fromarray(frames[0]).save(root / "image.png")
    Image.fromarray(frames[0]).resize((WIDTH * 2, HEIGHT * 2)).save(root / "large.png")
    return root


@pytest.fixture(scope="module")
def full(folder: Path) -> Evaluation:
    return evaluate_videos(
        EvaluationRequest(
            (folder / "clip.mp4",),
            (folder / "soft.mp4",),
            image=folder / "image.png",
            truth=folder / "clip.mp4",
            segment_size=None,
        )
    )


def test_the_still_control_is_in_every_table(full: Evaluation, folder: Path) -> None:
    clip, soft, still = full.videos
    assert [video.label for video in full.videos] == ["clip", "soft", STILL_LABEL]
    assert still.path is None
    assert clip.path == str(folder / "clip.mp4")
    assert set(clip.values) == set(soft.values) == set(still.values) == {metric.name for metric in full.metrics}
    assert still.num_frames == clip.num_frames == 7
    assert still.values["flow_magnitude"] == 0
    assert still.values["first_psnr"] == 100
    assert math.isnan(still.values["judder"])
    assert any("the image repeated" in note for note in still.notes)


def test_what_is_better_scores_better(full: Evaluation) -> None:
    clip, soft, still = (video.values for video in full.videos)
    assert clip["psnr"] == 100 > soft["psnr"]
    for name in ("ssim", "ms_ssim", "high_frequency_ratio", "first_psnr", "first_ssim", "detail_retention"):
        assert clip[name] > soft[name], name
    assert still["psnr"] < clip["psnr"] - 20
    assert clip["flow_magnitude"] == pytest.approx(2, abs=0.1)


def test_the_json_holds_every_number(full: Evaluation) -> None:
    again = json.loads(full.to_json())
    assert [video["label"] for video in again["videos"]] == [video.label for video in full.videos]
    numbers = {name: math.nan if value is None else value for name, value in again["videos"][0]["values"].items()}
    assert numbers == pytest.approx(full.videos[0].values, nan_ok=True)
    assert again["settings"]["segment_size"] == "auto"
    assert again["settings"]["versions"].keys() - {"vmaf-torch"} == {
        "swifti2v",
        "av",
        "numpy",
        "opencv-python-headless",
    }


def test_without_image_and_truth_the_control_is_frame_zero(folder: Path) -> None:
    result = evaluate_videos(EvaluationRequest((folder / "clip.mp4",)))
    names = {metric.name for metric in result.metrics}
    assert not names & {"psnr", "first_psnr", "detail_retention", "segment_size"}
    assert {"seam_luma", "drift_red", "flicker", "scene_cuts"} <= names
    assert any("frame 0 of clip" in note for note in result.videos[1].notes)


def test_a_rival_of_another_size_and_rate_is_fitted_and_said(folder: Path) -> None:
    request = EvaluationRequest((folder / "clip.mp4",), (folder / "wide.mp4",), image=folder / "large.png")
    clip, rival, _still = evaluate_videos(request).videos
    assert (rival.width, rival.height) == (WIDTH, HEIGHT)
    assert any("from 128x64 to 96x64" in note for note in rival.notes)
    assert any("20 frames per second, clip 10" in note for note in rival.notes)
    assert "image: fitted from 192x128 to 96x64" in clip.notes
    assert clip.values["first_psnr"] > 25


def test_progress_names_each_video(folder: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    evaluate_videos(EvaluationRequest((folder / "clip.mp4",)), on_progress=lambda *step: told.append(step))
    assert told[:7] == [("clip", done, 7) for done in range(1, 8)]
    assert told[7:] == [(STILL_LABEL, done, 7) for done in range(1, 8)]


def test_a_bad_rival_is_told_before_anything_is_judged(folder: Path) -> None:
    told: list[str] = []
    request = EvaluationRequest((folder / "clip.mp4",), (folder / "none.mp4",))
    with pytest.raises(VideoInputError, match="does not exist"):
        evaluate_videos(request, on_progress=lambda label, *_: told.append(label))
    assert told == []


def test_a_missing_image_is_told(folder: Path) -> None:
    with pytest.raises(ImageInputError, match="does not exist"):
        evaluate_videos(EvaluationRequest((folder / "clip.mp4",), image=folder / "none.png"))


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"videos": ()}, "videos"),
        ({"videos": (Path("a.mp4"),), "segment_size": 1}, "segment_size"),
        ({"videos": (Path("a.mp4"),), "cvvdp": "python"}, "truth"),
    ],
)
def test_requests_that_cannot_be_judged(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        EvaluationRequest(**given)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (("a/x.mp4", "b/y.mp4"), ("x", "y")),
        (("a/x.mp4", "b/x.mp4"), ("a/x", "b/x")),
        (("a/x.mp4", "a/x.mov", "a/x.mp4"), ("a/x", "a/x (2)", "a/x (3)")),
        (("still image.mp4",), ("still image (2)",)),
    ],
)
def test_labels_are_unique(paths: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert unique_labels([Path(path) for path in paths]) == labels


def test_markdown_has_a_row_for_each_metric(full: Evaluation) -> None:
    page = markdown(full)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | clip | soft | still image |"
    assert all(row.count(" | ") == 3 for row in rows)
    for metric in full.metrics:
        assert sum(metric.label in row for row in rows) >= 1
        assert f"- **{metric.label}**: " in page
    (psnr_row,) = [row for row in rows if row.startswith("| PSNR (dB)")]
    assert "**100.0**" in psnr_row
    assert psnr_row.count("**") == 2
    assert "OpenCV DIS" in page


def test_markdown_of_odd_names_and_missing_numbers() -> None:
    odd = VideoResult("a|b_*c", None, 4, 2, 1, 8.0, {"psnr": math.nan}, notes=("x | y",))
    page = markdown(Evaluation((odd,), metrics_of(["psnr"])))
    assert "a\\|b\\_\\*c" in page
    assert "x \\| y" in page
    assert "nan" not in page.lower().replace("meaning", "")
