"""Where the numbers go: our lines, TensorBoard's own reader on what we wrote, and stand-ins for hosted trackers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.observers import JsonLinesLog, TensorBoardLog, open_logs


def test_lines_after_the_checkpoint_and_torn_ones_are_dropped(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLinesLog(path, resumed_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    resumed = JsonLinesLog(path, resumed_step=2)
    resumed.write(3, {"loss": 7.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(1 / 3, rel=1e-6)
    assert lines[2]["loss"] == 7.0


def test_tensorboard_reads_what_was_written(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardLog(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0 / step})
    first.close()
    resumed = TensorBoardLog(tmp_path, resumed_step=2)
    resumed.write(3, {"loss": 9.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_hosted_tracker_gets_the_numbers_in_order(tmp_path, monkeypatch) -> None:
    calls = []
    fake = ModuleType("trackio")
    fake.__spec__ = ModuleSpec("trackio", None)
    fake.init = lambda **settings: calls.append(("init", settings["name"]))
    fake.log = lambda numbers, step: calls.append((step, numbers))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for log in open_logs(tmp_path / "run", ("trackio",), resumed_step=0)[-1:]:
        log.write(5, {"loss": 0.5})
        log.close()
    assert calls == [("init", "run"), (5, {"loss": 0.5}), "finish"]


def test_a_run_is_known_to_wandb_by_its_folder(tmp_path, monkeypatch) -> None:
    """A resumed run is found by its id, and two runs may be in folders of one name."""
    calls = []
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init = lambda **settings: calls.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a" / "run", Path("a/run"), tmp_path / "b" / "run"):
        open_logs(folder, ("wandb",), resumed_step=0)
    first, again, other = calls
    assert first == again
    assert first["resume"] == "allow"
    assert (first["name"], other["name"]) == ("run", "run")
    assert first["id"] != other["id"]
    assert first["id"].isalnum()


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("swifti2v.training.engine.observers.find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="wandb, which is not installed: pip install wandb"):
        open_logs(tmp_path, ("wandb",), resumed_step=0)
    assert [type(log) for log in open_logs(tmp_path, (), resumed_step=0)] == [JsonLinesLog]
