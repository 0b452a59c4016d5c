"""The options of Stage I: declared once, the same in every command that asks for a video."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from swifti2v.cli.generate import generate, preview
from swifti2v.cli.jobs import submit
from swifti2v.cli.stage_one_options import StageOneSampling

NAMES = {each.name for each in fields(StageOneSampling)}


@pytest.mark.parametrize("command", [generate, preview, submit])
def test_every_command_that_asks_for_a_video_takes_them(command: object) -> None:
    parameters = inspect.signature(command).parameters  # type: ignore[arg-type]
    assert set(parameters) >= NAMES
    assert "stage_one" not in parameters


def test_what_is_not_given_is_left_to_the_checkpoint() -> None:
    assert not any(value is not None for value in StageOneSampling().choices().values())
    given = StageOneSampling(True, 20, 3.5, 3.0, 4.0, "blurry")
    assert given.choices() == {
        "few_step": False,
        "stage_one_steps": 20,
        "stage_one_guidance_scale": 3.5,
        "stage_one_guidance_scale_2": 3.0,
        "stage_one_flow_shift": 4.0,
        "negative_prompt": "blurry",
    }
