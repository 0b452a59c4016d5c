"""Every setting is an option of every command that asks for a video, under the flag and help of the settings."""

from __future__ import annotations

import inspect

import pytest
from typer.testing import CliRunner

from swifti2v.cli.generate import generate, preview
from swifti2v.cli.jobs import submit
from swifti2v.cli.main import app
from swifti2v.cli.setting_options import STAGE_ONE_SETTINGS
from swifti2v.settings import OPTIONS

OFFERED = {name for name, option in OPTIONS.items() if option.flag is not None}


@pytest.mark.parametrize(
    ("command", "names"), [(generate, OFFERED), (submit, OFFERED), (preview, OFFERED & set(STAGE_ONE_SETTINGS))]
)
def test_every_command_that_asks_for_a_video_takes_them(command: object, names: set[str]) -> None:
    parameters = inspect.signature(command).parameters  # type: ignore[arg-type]
    assert set(parameters) >= names
    assert "choices" not in parameters


def test_what_decides_stage_two_alone_is_no_option_of_a_preview() -> None:
    assert "num_inference_steps" not in STAGE_ONE_SETTINGS
    assert {"num_frames", "seed", "stage_one_steps", "negative_prompt", "fps"} <= set(STAGE_ONE_SETTINGS)


def test_help_shows_the_options_in_groups() -> None:
    text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for words in ("--stage-one-steps", "--segment-size", "Stage II", "Speed and memory", "--many-step"):
        assert words in text
