"""Scoring by a stand-in for VBench in a process of its own: what it is told, what is checked, what goes wrong."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from swifti2v.errors import InvalidInputError, MemoryBudgetError, OutputError, VideoInputError
from swifti2v.evaluation.vbench.clips import clips_of
from swifti2v.evaluation.vbench.generation import VideoRun, make_videos
from swifti2v.evaluation.vbench.makers import ClipShape, StillMaker
from swifti2v.evaluation.vbench.scoring import Judge, check_sizes, expected_videos, score_videos
from swifti2v.evaluation.vbench.suite import Suite, prepare_suite
from swifti2v.evaluation.vbench.total import DIMENSION_NAMES, read_scores, total_scores
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from tests.evaluation.vbench_checkout import MAGI_ONE, make_checkout

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = ClipShape(Size(64, 64), 3, 8.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, a suite, and one video for each prompt; tests take a copy."""
    root = tmp_path_factory.mktemp("prepared")
    suite = prepare_suite(make_checkout(root / "VBench"), root / "suite", size=SHAPE.size)
    make_videos(clips_of(suite, num_samples=1), StillMaker(SHAPE), VideoRun(root / "run", {}))
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def suite(root: Path) -> Suite:
    from swifti2v.evaluation.vbench.suite import load_suite

    return load_suite(root / "suite")


def checkout_again(root: Path, **changes: Any) -> Judge:
    shutil.rmtree(root / "VBench")
    return Judge(make_checkout(root / "VBench", **changes), sys.executable)


def score(root: Path, suite: Suite, judge: Judge | None = None, **options: Any) -> Any:
    judge = judge or Judge(root / "VBench", sys.executable)
    options = {"num_samples": 1} | options
    return score_videos(root / "run" / "videos", suite, judge, root / "results", **options)


def test_from_videos_to_the_published_row(root: Path, suite: Suite) -> None:
    seen: list[tuple[str, int]] = []
    scoring = score(root, suite, on_dimension=lambda *told: seen.append(told))
    assert scoring.scores == MAGI_ONE
    assert [name for name, _ in seen] == list(DIMENSION_NAMES)
    assert dict(seen) == dict(scoring.num_videos)
    assert scoring.num_videos["aesthetic_quality"] == 2
    assert scoring.num_videos["camera_motion"] == 1
    totals = total_scores(read_scores(root / "results"))
    assert [round(100 * value, 2) for value in (totals.quality, totals.i2v, totals.total)] == [82.44, 96.12, 89.28]
    written = json.loads((root / "results" / "scoring.json").read_text())
    assert written["scores"] == MAGI_ONE
    assert written["versions"]["python"] == sys.version.split()[0]
    assert written["size"] == "64x64"


def test_vbench_is_told_what_its_script_drops(root: Path, suite: Suite) -> None:
    """A `torch.device` instead of a string (the stand-in refuses strings), local weights, and the preprocessing."""
    judge = Judge(root / "VBench", sys.executable, device="cpu", local_weights=True)
    score(root, suite, judge, dimensions=["imaging_quality"])
    log = (root / "results" / "logs" / "imaging_quality.log").read_text()
    assert 'calls cpu True {"imaging_quality_preprocessing_mode": "longer"}' in log
    assert "WARNING!!! This required video is not found! a bear in the water-4.mp4" in log


def test_a_scoring_continues(root: Path, suite: Suite) -> None:
    score(root, suite, dimensions=["i2v_subject"])
    seen: list[str] = []
    scoring = score(
        root, suite, dimensions=["i2v_subject", "camera_motion"], on_dimension=lambda name, _count: seen.append(name)
    )
    assert seen == ["camera_motion"]
    assert list(scoring.scores) == ["i2v_subject", "camera_motion"]
    assert list(scoring.seconds) == ["camera_motion"]


def test_nothing_is_written_into_the_checkout(root: Path, suite: Suite) -> None:
    (root / "VBench" / "models").mkdir()
    before = {path for path in (root / "VBench").rglob("*") if "__pycache__" not in path.parts}
    score(root, suite, dimensions=["i2v_background"])
    assert {path for path in (root / "VBench").rglob("*") if "__pycache__" not in path.parts} == before
    assert (root / "suite" / "models").resolve() == (root / "VBench" / "models").resolve()


def test_notes_on_what_the_numbers_mean(root: Path, suite: Suite) -> None:
    (note, other) = score(root, suite, dimensions=["i2v_subject"]).notes
    assert note == "not the 5 videos of every prompt: not comparable with the leaderboard"
    assert other.startswith("without dynamic_degree a still picture")


@pytest.mark.parametrize(("size", "large"), [(Size(2560, 1408), True), (Size(1280, 704), False)])
def test_a_note_on_flow_at_2k(
    root: Path, suite: Suite, size: Size, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(320 * 176)^2 is 3.17e9, above 2^31; at half the size it is 16 times less."""
    monkeypatch.setattr("swifti2v.evaluation.vbench.scoring.check_sizes", lambda *_arguments: size)
    notes = score(root, suite, dimensions=["dynamic_degree"]).notes
    assert any("RAFT correlates 3.2e9 pairs at 2560x1408" in note for note in notes) == large
    assert any("512 pixels or fewer" in note for note in notes)


def test_videos_that_are_missing(root: Path, suite: Suite) -> None:
    videos = root / "run" / "videos"
    (videos / "a bear in the water-0.mp4").unlink()
    with pytest.raises(VideoInputError, match=r"i2v_subject lacks 1 of 1 videos, 'a bear in the water-0\.mp4'"):
        score(root, suite)
    with pytest.raises(VideoInputError, match="aesthetic_quality lacks 1 of 2"):
        expected_videos(videos, suite, ["aesthetic_quality"], num_samples=1)
    expected = expected_videos(videos, suite, ["aesthetic_quality"], num_samples=1, allow_missing=True)
    assert expected == {"aesthetic_quality": ("a beach at dusk-0.mp4",)}
    with pytest.raises(VideoInputError, match="i2v_subject lacks"):  # of which nothing is left
        expected_videos(videos, suite, ["i2v_subject"], num_samples=1, allow_missing=True)
    with pytest.raises(VideoInputError, match="lacks 9 of 10"):
        expected_videos(videos, suite, ["aesthetic_quality"], num_samples=5)


def test_strangers_among_the_videos(root: Path, suite: Suite) -> None:
    videos = root / "run" / "videos"
    for name in ("clips.jsonl", "a bear in the water.mp4", "another prompt-0.mp4", "a bear in the water-5.mp4"):
        (videos / name).touch()
        with pytest.raises(VideoInputError, match="no video of the suite"):
            score(root, suite)
        (videos / name).unlink()
    (videos / "a bear in the water-1.mp4").touch()
    with pytest.raises(VideoInputError, match="beyond 1 samples; pass a larger --samples"):
        score(root, suite)
    with pytest.raises(VideoInputError, match="does not exist"):
        expected_videos(root / "nowhere", suite, ["i2v_subject"], num_samples=1)


def test_sizes(root: Path, suite: Suite, tmp_path: Path) -> None:
    def write(name: str, size: Size) -> str:
        with VideoWriter(tmp_path / name, size=size, fps=8) as writer:
            writer.write(np.zeros((1, size.height, size.width, 3), dtype=np.uint8))
        return name

    small, large, wide = write("a.mp4", Size(32, 32)), write("b.mp4", Size(64, 64)), write("c.mp4", Size(64, 32))
    assert check_sizes(tmp_path, [small], suite) == (32, 32)  # smaller than the pictures, of their aspect
    with pytest.raises(VideoInputError, match="64x64, others are 32x32"):
        check_sizes(tmp_path, [small, large], suite)
    with pytest.raises(VideoInputError, match="the videos are 64x32, the suite's pictures 64x64"):
        check_sizes(tmp_path, [wide], suite)
    with pytest.raises(VideoInputError, match="holds no videos"):
        check_sizes(tmp_path, [], suite)


def test_results_of_other_videos_are_not_taken_over(root: Path, suite: Suite) -> None:
    score(root, suite, dimensions=["i2v_subject"])
    shutil.copytree(root / "run", root / "other")
    judge = Judge(root / "VBench", sys.executable)
    with pytest.raises(VideoInputError, match="judges others than those of the folder"):
        score_videos(
            root / "other" / "videos", suite, judge, root / "results", dimensions=["i2v_subject"], num_samples=1
        )
    file = root / "results" / "vbench" / "i2v_subject_eval_results.json"
    file.write_text(json.dumps({"i2v_subject": [0.9, []]}))
    with pytest.raises(VideoInputError, match="judges 0 videos, not the 1"):
        score(root, suite, dimensions=["i2v_subject"])


def test_a_checkout_like_the_pypi_package(root: Path, suite: Suite) -> None:
    shutil.rmtree(root / "VBench" / "vbench2_beta_i2v" / "third_party")
    with pytest.raises(InvalidInputError, match=r"lacks vbench2_beta_i2v/third_party/cotracker; .* not the PyPI"):
        score(root, suite)


def test_no_interpreter(root: Path, suite: Suite) -> None:
    with pytest.raises(InvalidInputError, match="no program that can be run"):
        score(root, suite, Judge(root / "VBench", str(root / "python")))
    other = root / "false"
    other.write_text("#!/bin/sh\necho 'not a python' >&2\nexit 3\n")
    other.chmod(0o755)
    with pytest.raises(InvalidInputError, match=r"VBench failed on i2v_subject \(not a python\)"):
        score(root, suite, Judge(root / "VBench", str(other)))


@pytest.mark.parametrize(
    ("crash", "error", "words"),
    [
        ("CUDA out of memory. Tried to allocate 12.7 GB", MemoryBudgetError, "use a card with more memory"),
        ("<URLError: no route>", InvalidInputError, "fetch the weights first"),
        ("cannot import name 'Cache' from 'transformers'", InvalidInputError, "transformers and peft"),
        ("operator torchvision::nms does not exist", InvalidInputError, "of one build"),
        ("an odd thing", InvalidInputError, "RuntimeError: an odd thing"),
    ],
)
def test_vbench_fails(root: Path, suite: Suite, crash: str, error: type[Exception], words: str) -> None:
    judge = checkout_again(root, crash=crash)
    with pytest.raises(error, match="VBench failed on dynamic_degree") as raised:
        score(root, suite, judge, dimensions=["dynamic_degree"])
    assert words in str(raised.value)
    assert str(root / "results" / "logs" / "dynamic_degree.log") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list((root / "results" / "vbench").iterdir()) == []


def test_dimensions_outside_the_score(root: Path, suite: Suite) -> None:
    with pytest.raises(InvalidInputError, match="temporal_flickering: not a dimension of the VBench-I2V score"):
        score(root, suite, dimensions=["temporal_flickering"])


def test_results_that_cannot_be_written(root: Path, suite: Suite) -> None:
    (root / "results").write_text("")
    with pytest.raises(OutputError):
        score(root, suite, dimensions=["i2v_subject"])
