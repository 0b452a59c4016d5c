"""`swifti2v app`: who it serves, and what it says when a package is missing; it runs in `tests/webapp`."""

from __future__ import annotations

import builtins
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from swifti2v.cli import app as app_module
from swifti2v.errors import ConfigurationError, InvalidInputError, SwiftI2VError
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.runner import PipelineRunner
from swifti2v.memory.networks import WAN22
from swifti2v.pipelines.acceleration import Acceleration

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.1.2.3", False), ("a.b", False)]
)
def test_who_can_reach_the_app(host: str, alone: bool) -> None:
    assert app_module.is_loopback(host) == alone


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without_gradio(name: str, *rest: Any, **options: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("no gradio", name="gradio")
        return usual(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "gradio", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_gradio)
    with pytest.raises(ConfigurationError, match=r"needs gradio; install it with: pip install 'swifti2v\[app\]'"):
        app_module._prepare_gradio()


def test_networks_of_the_plan_need_no_download() -> None:
    assert app_module._dimensions("wan2.2") == WAN22
    assert app_module._dimensions("mini") is not None
    assert app_module._dimensions("somebody/something") is None


def test_an_unknown_model_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")
    program = typer.Typer()
    program.command()(app_module.app)
    data = tmp_path / "data"
    result = CliRunner().invoke(program, ["--model", str(tmp_path / "none"), "--data-dir", str(data)])
    assert isinstance(result.exception, SwiftI2VError)
    assert "\n" not in str(result.exception)


def test_the_worker_runs_as_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")
    given = []

    def stop(*arguments: Any, few_step: bool) -> Any:
        given.append((*arguments, few_step))
        raise InvalidInputError("far enough")

    monkeypatch.setattr(app_module, "pipeline_runner", stop)
    program = typer.Typer()
    program.command()(app_module.app)
    options = ["--attention", "native", "--compile", "--decoder", "light", "--decoder-weights", "w", "--memory", "2GB"]
    result = CliRunner().invoke(program, [*options, "--decode-device", "cpu", "--data-dir", str(tmp_path)])
    assert str(result.exception) == "far enough"
    expected = Acceleration("native", compile_blocks=True, decoder="light", decoder_weights="w", decode_device="cpu")
    assert CliRunner().invoke(program, ["--many-step", "--data-dir", str(tmp_path)]).exit_code == 1
    assert given == [(None, "2GB", expected, True), (None, None, Acceleration(), False)]


def test_the_worker_stops_with_the_app(tmp_path: Path) -> None:
    queue = JobQueue.open(tmp_path)
    runner = PipelineRunner(lambda _name: pytest.fail("there is no job"))
    with app_module._working(queue, "mini", runner):
        assert "worker" in {thread.name for thread in threading.enumerate()}
    assert "worker" not in {thread.name for thread in threading.enumerate()}
