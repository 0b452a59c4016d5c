"""`swifti2v app`: who it serves, and what it says when a package is missing; it runs in `tests/webapp`."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from swifti2v.cli import app as app_module
from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.runner.acceleration import Acceleration

if TYPE_CHECKING:
    from pathlib import Path


def opened(*arguments: str) -> BaseException | None:
    """Run the command, which is to fail, and return what it raised."""
    program = typer.Typer()
    program.command()(app_module.app)
    return CliRunner().invoke(program, arguments).exception


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigurationError, match=r"swifti2v\[app\]"):
        raise opened() or AssertionError


def test_networks_of_the_plan_need_no_download() -> None:
    assert app_module._dimensions("wan2.2") is not None
    assert app_module._dimensions("mini") is not None
    assert app_module._dimensions("somebody/something") is None


def test_an_unknown_model_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")
    data = ("--data-dir", str(tmp_path / "data"))
    assert isinstance(opened("--model", str(tmp_path / "none"), *data), CheckpointError)


def test_the_worker_runs_as_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")
    given = []

    def stop(*arguments: Any, few_step: bool) -> Any:
        given.append((*arguments, few_step))
        raise InvalidInputError("far enough")

    monkeypatch.setattr(app_module, "pipeline_runner", stop)
    options = ["--attention", "native", "--compile", "--decoder", "light", "--decoder-weights", "w", "--memory", "2GB"]
    data = ("--data-dir", str(tmp_path))
    for arguments in ([*options, "--decode-device", "cpu"], ["--many-step"]):
        assert str(opened(*arguments, *data)) == "far enough"
    expected = Acceleration("native", compile_blocks=True, decoder="light", decoder_weights="w", decode_device="cpu")
    assert given == [(None, "2GB", expected, True), (None, None, Acceleration(), False)]


def test_the_worker_stops_with_the_app(tmp_path: Path) -> None:
    queue = JobQueue.open(tmp_path)
    runner = PipelineRunner(lambda _name: pytest.fail("there is no job"))
    with app_module._working(queue, "mini", runner):
        assert "worker" in {thread.name for thread in threading.enumerate()}
    assert "worker" not in {thread.name for thread in threading.enumerate()}
