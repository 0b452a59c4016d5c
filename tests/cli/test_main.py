"""The command line as a process: quick help without torch, errors of one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import swifti2v
from swifti2v.cli.main import EXIT_ERROR, EXIT_INTERRUPTED, ReportingGroup, app
from swifti2v.errors import GenerationCancelled, ImageInputError, OutputError

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "cv2", "av", "PIL")
# Light each, but only commands need them, and help should take little more than typer's own.
FOR_COMMANDS = ("yaml", "rich.progress", "swifti2v.config", "swifti2v.memory.plan")
# Imports every module of the command line and shows the help, then names what was loaded.
HELP = f"""
import pkgutil, sys
from importlib import import_module
import swifti2v.cli
for module in pkgutil.iter_modules(swifti2v.cli.__path__):
    import_module("swifti2v.cli." + module.name)
from swifti2v.cli.main import app
try:
    app(["--help"])
except SystemExit as exit:
    assert exit.code == 0
print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)  # noqa: S603 - our own code


def test_help_loads_nothing_heavy() -> None:
    result = run_python(HELP)
    assert "plan" in result.stdout
    assert result.stdout.strip().endswith("LOADED")


def test_help_loads_nothing_that_only_commands_need() -> None:
    code = f"""
import sys
from swifti2v.cli.main import app
try:
    app(["--help"])
except SystemExit:
    print("LOADED", *[name for name in {FOR_COMMANDS!r} if name in sys.modules])
"""
    assert run_python(code).stdout.strip().endswith("LOADED")


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"swifti2v {swifti2v.__version__}"


def test_every_command_has_help() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert "plan" in names
    for name in names:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, name
        assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ImageInputError("no image at x.jpg;\n give an existing file"),
            EXIT_ERROR,
            "error: no image at x.jpg; give an existing file",
        ),
        (
            OutputError("cannot write out.mp4; choose another folder"),
            EXIT_ERROR,
            "error: cannot write out.mp4; choose another folder",
        ),
        (GenerationCancelled("3 of 7 segments are kept"), EXIT_INTERRUPTED, "cancelled: 3 of 7 segments are kept"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted: stopped by Ctrl-C"),
    ],
    ids=["input", "output", "cancelled", "ctrl-c"],
)
def test_errors_become_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    failing = typer.Typer(cls=ReportingGroup, add_completion=False)

    @failing.callback()
    def options() -> None:
        """Make it a group."""

    @failing.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(failing, ["fail"])
    assert result.exit_code == code
    assert result.stderr == line + "\n"
    assert result.stdout == ""


def test_errors_in_an_option_are_reported_too() -> None:
    failing = typer.Typer(cls=ReportingGroup, add_completion=False)

    @failing.callback()
    def options() -> None:
        """Make it a group."""

    @failing.command()
    def resize(size: Annotated[swifti2v.Size, typer.Option(parser=swifti2v.Size.parse)]) -> None:
        raise AssertionError

    result = CliRunner().invoke(failing, ["resize", "--size", "big"])
    assert result.exit_code == EXIT_ERROR
    assert "WIDTHxHEIGHT" in result.stderr


def test_other_errors_are_not_hidden() -> None:
    failing = typer.Typer(cls=ReportingGroup, add_completion=False)

    @failing.callback()
    def options() -> None:
        """Make it a group."""

    @failing.command()
    def fail() -> None:
        raise RuntimeError("a bug")

    result = CliRunner().invoke(failing, ["fail"])
    assert isinstance(result.exception, RuntimeError)
