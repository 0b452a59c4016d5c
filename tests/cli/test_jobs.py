"""`swifti2v jobs ...`: from the command line to a file and back."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from swifti2v.cli.jobs import app
from swifti2v.errors import ConfigurationError, ImageInputError, InvalidInputError, JobError, SwiftI2VError
from swifti2v.jobs.logs import JsonFormatter
from swifti2v.media.video_reader import VideoReader
from swifti2v.runner.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHORT = ("--frames", "9", "--steps", "1", "--stage-one-steps", "1", "--segment-size", "1")
WORK = ("work", "--until-idle", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Let a pipeline that is asked for again be the one that was loaded."""
    loaded: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("from_pretrained", "of_stage"):
            load = getattr(TwoStagePipeline, name)

            def once(*given: Any, load: Any = load, **options: Any) -> Any:
                key = repr((load.__name__, given, options))
                return loaded[key] if key in loaded else loaded.setdefault(key, load(*given, **options))

            patch.setattr(TwoStagePipeline, name, once)
        yield


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def model(tiny_checkpoint: Path) -> tuple[str, str]:
    return ("--model", str(tiny_checkpoint))


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
    jobs: Callable[..., str], photo: str, model: tuple[str, str], tmp_path: Path
) -> None:
    job_id = jobs("submit", photo, "--prompt", "pan\n left", *model, *SHORT).strip()
    assert re.fullmatch("video_[0-9a-f]{32}", job_id)
    assert jobs("list").split() == [job_id, "queued", "0%", model[1], "pan", "left"]
    assert json.loads(jobs("show", job_id))["video"] is None

    jobs(*WORK, *model)
    shown = json.loads(jobs("show", job_id))
    assert (shown["state"], shown["progress"]["percent"], shown["attempts"]) == ("completed", 100, 1)
    assert "lease_token" not in shown
    frames = np.concatenate(list(VideoReader(tmp_path / "data" / shown["video"])))
    assert frames.shape == (9, 64, 64, 3)
    assert json.loads(jobs("list", "--json")) == [shown]

    assert jobs("cancel", job_id) == f"{job_id}: completed\n"
    assert jobs("prune", "--max-age-hours", "1") == "removed 0 jobs, 0.0 MB\n"
    assert jobs("prune", "--max-gigabytes", "0").startswith("removed 1 jobs, ")
    with pytest.raises(JobError):
        jobs("show", job_id)


def test_a_preview_and_its_video(jobs: Callable[..., str], photo: str, model: tuple[str, str], tmp_path: Path) -> None:
    """A worker that was told nothing of previews does both."""
    preview = jobs("submit", photo, "--preview", *model, *SHORT).strip()
    with pytest.raises(JobError):
        jobs("continue", preview)
    jobs(*WORK)
    video = jobs("continue", preview).strip()
    jobs(*WORK)
    sizes = {}
    for job_id in (preview, video):
        shown = json.loads(jobs("show", job_id))
        sizes[job_id] = np.concatenate(list(VideoReader(tmp_path / "data" / shown["video"]))).shape
    assert sizes == {preview: (9, 16, 16, 3), video: (9, 64, 64, 3)}


def test_two_workers_of_one_stage_each_in_many_steps(
    jobs: Callable[..., str], photo: str, model: tuple[str, str]
) -> None:
    """A job of many steps runs where Stage I was loaded so; elsewhere it fails for good."""
    asked = {"--stage-one-guidance": 3.0, "--stage-one-guidance-2": 2.0, "--stage-one-flow-shift": 3.0, "--guidance": 2}
    words = [word for pair in asked.items() for word in map(str, pair)]
    submit = ("submit", photo, *model, *SHORT, "--many-step", *words, "--negative-prompt", "blurry")
    job_id = jobs(*submit).strip()
    options = json.loads(jobs("show", job_id))["request"]["options"]
    names = ("stage_one_guidance_scale", "stage_one_guidance_scale_2", "stage_one_flow_shift", "guidance_scale")
    assert [options[name] for name in names] == list(asked.values())
    assert (options["few_step"], options["negative_prompt"]) == (False, "blurry")
    states = []
    for stage in ("two", "one", "two"):
        jobs(*WORK, *model, "--stage", stage, "--many-step")
        shown = json.loads(jobs("show", job_id))
        states.append((shown["state"], shown["next_stage"], shown["claims"], shown["attempts"]))
    assert states == [
        ("queued", "stage_one", 0, 0),
        ("queued", "stage_two", 1, 0),
        ("completed", "stage_two", 2, 1),
    ]
    other = jobs(*submit).strip()
    jobs(*WORK, *model)
    assert json.loads(jobs("show", other))["failure"]["code"] == "invalid_input"


def test_cancelling(jobs: Callable[..., str], photo: str, model: tuple[str, str]) -> None:
    first, second = (jobs("submit", photo, *model).strip() for _ in range(2))
    assert jobs("cancel", first) == f"{first}: cancelled\n"
    assert jobs("cancel", second, "--remove") == f"{second}: removed\n"
    assert [line.split()[:2] for line in jobs("list").splitlines()] == [[first, "cancelled"]]


def test_mistakes_are_found_before_the_job_is_queued(
    jobs: Callable[..., str], photo: str, model: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageInputError):
        jobs("submit", str(tmp_path / "text.png"), *model)
    with pytest.raises(InvalidInputError) as caught:
        jobs("submit", photo, *model, "--frames", "10")
    assert (caught.value.param, caught.value.value) == ("num_frames", 10)
    with pytest.raises(JobError):
        jobs("cancel", "../../etc/passwd")
    with pytest.raises(ConfigurationError):
        jobs("list", "--database", "nonsense")
    with pytest.raises(InvalidInputError):
        jobs(*WORK, "--decoder-weights", "weights without the decoder that takes them")
    assert jobs("list") == ""


def test_a_line_of_the_log_is_one_object() -> None:
    record = logging.LogRecord("swifti2v.jobs", logging.INFO, "", 0, "two\n%s", ("lines",), None)
    record.status, record.unknown = 200, "left out"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = {"level": "INFO", "logger": "swifti2v.jobs", "message": "two\nlines", "status": 200}
    assert json.loads(line) == said | {"time": round(record.created, 3)}
