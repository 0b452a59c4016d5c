"""`swifti2v jobs ...`: from the command line to a file and back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from swifti2v.cli.jobs import app
from swifti2v.errors import ConfigurationError, ImageInputError, InvalidInputError, JobError, SwiftI2VError
from swifti2v.media.video_reader import VideoReader
from tests.runner.light_weights import write_light_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = ("--frames", "9", "--steps", "1", "--stage-one-steps", "1", "--segment-size", "1")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[..., str]:
    """Run `swifti2v jobs ...` on a data folder of its own and return what it printed."""

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "data")])
        if isinstance(result.exception, SwiftI2VError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_a_job_from_submission_to_removal(
    jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = ("--model", str(tiny_checkpoint))
    job_id = jobs("submit", str(photo), "--prompt", "pan\n left", *model, *SHORT).strip()
    assert re.fullmatch("video_[0-9a-f]{32}", job_id)
    assert jobs("list").split() == [job_id, "queued", "0%", str(tiny_checkpoint), "pan", "left"]
    assert json.loads(jobs("show", job_id))["video"] is None

    jobs("work", "--until-idle", "--device", "cpu", *model)
    shown = json.loads(jobs("show", job_id))
    assert (shown["state"], shown["progress"]["percent"], shown["attempts"]) == ("completed", 100, 1)
    assert "lease_token" not in shown
    (frames,) = [np.concatenate(list(VideoReader(tmp_path / "data" / shown["video"])))]
    assert frames.shape == (9, 64, 64, 3)
    assert json.loads(jobs("list", "--json")) == [shown]

    assert jobs("cancel", job_id) == f"{job_id}: completed\n"
    assert jobs("prune", "--max-age-hours", "1") == "removed 0 jobs, 0.0 MB\n"
    assert jobs("prune", "--max-gigabytes", "0").startswith("removed 1 jobs, ")
    with pytest.raises(JobError, match="there is no job"):
        jobs("show", job_id)


def test_a_preview_and_its_video(jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A worker that was told nothing of previews does both."""
    model = ("--model", str(tiny_checkpoint))
    preview = jobs("submit", str(photo), "--preview", *model, *SHORT).strip()
    with pytest.raises(JobError, match="is not finished"):
        jobs("continue", preview)
    jobs("work", "--until-idle", "--device", "cpu")
    video = jobs("continue", preview).strip()
    jobs("work", "--until-idle", "--device", "cpu")
    sizes = {}
    for job_id in (preview, video):
        shown = json.loads(jobs("show", job_id))
        sizes[job_id] = np.concatenate(list(VideoReader(tmp_path / "data" / shown["video"]))).shape
    assert sizes == {preview: (9, 16, 16, 3), video: (9, 64, 64, 3)}


def test_two_workers_of_one_stage_each(jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path) -> None:
    model, work = ("--model", str(tiny_checkpoint)), ("work", "--until-idle", "--device", "cpu")
    job_id = jobs("submit", str(photo), *model, *SHORT).strip()
    states = []
    for stage in ("two", "one", "two"):
        jobs(*work, *model, "--stage", stage)
        shown = json.loads(jobs("show", job_id))
        states.append((shown["state"], shown["next_stage"], shown["claims"], shown["attempts"]))
    assert states == [
        ("queued", "stage_one", 0, 0),
        ("queued", "stage_two", 1, 0),
        ("completed", "stage_two", 2, 1),
    ]


def test_a_worker_decodes_as_it_was_told(
    jobs: Callable[..., str],
    photo: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, work = ("--model", str(tiny_checkpoint)), ("work", "--until-idle", "--device", "cpu")
    weights = write_light_weights(tmp_path / "light.safetensors")
    videos = []
    for options in ((), ("--decoder", "light", "--decoder-weights", str(weights))):
        job_id = jobs("submit", str(photo), *model, *SHORT).strip()
        jobs(*work, *model, *options)
        shown = json.loads(jobs("show", job_id))
        videos.append(np.concatenate(list(VideoReader(tmp_path / "data" / shown["video"]))))
    exact, light = videos
    assert exact.shape == light.shape == (9, 64, 64, 3)
    assert np.abs(exact.astype(int) - light).max() > 16
    assert [
        f"decoder_weights='{weights}'" in record.message for record in caplog.records if "runs on" in record.message
    ] == [
        False,
        True,
    ]
    with pytest.raises(InvalidInputError, match="use decoder light"):
        jobs(*work, "--decoder-weights", str(weights))


def test_a_job_of_many_steps(jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path) -> None:
    """It runs where Stage I was loaded so; elsewhere it fails, and says what the worker is to be given."""
    model = ("--model", str(tiny_checkpoint))
    asked = {"--stage-one-guidance": 3.0, "--stage-one-guidance-2": 2.0, "--stage-one-flow-shift": 3.0, "--guidance": 2}
    words = [word for pair in asked.items() for word in map(str, pair)]
    submit = ("submit", str(photo), *model, *SHORT, "--many-step", *words, "--negative-prompt", "blurry")
    job_id = jobs(*submit).strip()
    options = json.loads(jobs("show", job_id))["request"]["options"]
    names = ("stage_one_guidance_scale", "stage_one_guidance_scale_2", "stage_one_flow_shift", "guidance_scale")
    assert [options[name] for name in names] == list(asked.values())
    assert (options["few_step"], options["negative_prompt"]) == (False, "blurry")
    work = ("work", "--until-idle", "--device", "cpu", *model)
    jobs(*work, "--many-step")
    assert json.loads(jobs("show", job_id))["state"] == "completed"
    other = jobs(*submit).strip()
    jobs(*work)
    failure = json.loads(jobs("show", other))["failure"]
    assert failure["code"] == "invalid_input"
    assert "load with few_step=False for many steps" in failure["message"]


def test_two_workers_of_one_stage_each_in_many_steps(
    jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path
) -> None:
    model = ("--model", str(tiny_checkpoint))
    job_id = jobs("submit", str(photo), *model, *SHORT).strip()
    for stage in ("one", "two"):
        jobs("work", "--until-idle", "--device", "cpu", "--stage", stage, "--many-step", *model)
    assert json.loads(jobs("show", job_id))["state"] == "completed"


def test_cancelling(jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path) -> None:
    first, second = (jobs("submit", str(photo), "--model", str(tiny_checkpoint)).strip() for _ in range(2))
    assert jobs("cancel", first) == f"{first}: cancelled\n"
    assert jobs("cancel", second, "--remove") == f"{second}: removed\n"
    assert [line.split()[:2] for line in jobs("list").splitlines()] == [[first, "cancelled"]]


def test_mistakes_are_found_before_the_job_is_queued(
    jobs: Callable[..., str], photo: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = ("--model", str(tiny_checkpoint))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageInputError, match="is not a readable picture"):
        jobs("submit", str(tmp_path / "text.png"), *model)
    with pytest.raises(InvalidInputError, match=r"use 4k\+1 frames"):
        jobs("submit", str(photo), *model, "--frames", "10")
    with pytest.raises(JobError, match="there is no job"):
        jobs("cancel", "../../etc/passwd")
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        jobs("list", "--database", "nonsense")
    assert jobs("list") == ""
