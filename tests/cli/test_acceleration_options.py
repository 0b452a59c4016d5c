"""The options of acceleration: declared once, the same in every command that runs networks."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.app import app as web_app
from swifti2v.cli.generate import generate
from swifti2v.cli.jobs import work
from swifti2v.cli.serve import serve
from swifti2v.runner.acceleration import Acceleration

NAMES = [each.name for each in fields(AccelerationOptions)]


@pytest.mark.parametrize("command", [generate, work, serve, web_app])
def test_every_command_that_runs_networks_takes_them(command: object) -> None:
    parameters = inspect.signature(command).parameters  # type: ignore[arg-type]
    assert set(NAMES) <= set(parameters)
    assert "accelerated_by" not in parameters


def test_given_options_reach_the_command() -> None:
    seen: list[Acceleration] = []
    app = typer.Typer()

    @app.command()
    @with_acceleration_options
    def run(*, before: int = 0, accelerated_by: AccelerationOptions, after: int = 0) -> None:
        seen.append(accelerated_by.acceleration(num_processes=before + after))

    arguments = ["--before", "1", "--attention", "native", "--compile", "--quantization", "float8"]
    arguments += ["--decoder", "light", "--decoder-weights", "w", "--decode-device", "cpu", "--after", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert seen == [
        Acceleration(
            "native",
            compile_blocks=True,
            quantization="float8",
            num_processes=3,
            decoder="light",
            decoder_weights="w",
            decode_device="cpu",
        )
    ]


def test_defaults_are_those_of_a_pipeline() -> None:
    assert AccelerationOptions().acceleration() == Acceleration()


def test_a_process_that_does_not_decode_opens_no_decoder() -> None:
    options = AccelerationOptions(attention="native", decoder="light", decoder_weights="w", decode_device="cpu")
    assert options.acceleration(decodes=False) == Acceleration("native")
