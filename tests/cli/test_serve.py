"""`swifti2v serve`: what it refuses, and its keys; the server itself runs in `tests/serving/test_end_to_end.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from swifti2v.cli import jobs, serve
from swifti2v.errors import InvalidInputError, SwiftI2VError
from swifti2v.jobs.state import ALL_STAGES, JobStage
from swifti2v.runner.acceleration import Acceleration
from swifti2v.serving.keys import KeyFile
from swifti2v.serving.settings import ClusterSettings, ServiceSettings

if TYPE_CHECKING:
    from pathlib import Path

FAST = (
    *("--attention", "native", "--compile", "--decode-device", "cpu"),
    "--decoder",
    "light",
    "--decoder-weights",
    "w",
)
FAST_ACCELERATION = Acceleration(
    "native", compile_blocks=True, decoder="light", decoder_weights="w", decode_device="cpu"
)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(serve.app, arguments)
    if isinstance(result.exception, SwiftI2VError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_keys_are_made_and_taken_away(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    key = run("add-key", "ann", "--max-active-jobs", "2", *data).strip()
    file = KeyFile(tmp_path / "data" / "keys.json")
    found = file.find(key)
    assert found is not None
    assert (found.name, found.max_active_jobs) == ("ann", 2)
    assert run("remove-key", "ann", *data) == "ann: removed\n"
    assert file.find(key) is None
    with pytest.raises(InvalidInputError, match="cannot name a key"):
        run("add-key", "../ann", *data)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])  # noqa: S104 - it is refused
def test_others_are_not_served_without_keys(tmp_path: Path, tiny_checkpoint: Path, host: str) -> None:
    with pytest.raises(InvalidInputError, match="add-key"):
        run("--host", host, "--model", str(tiny_checkpoint), "--data", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)]
)
def test_who_can_reach_the_service(host: str, alone: bool) -> None:
    assert serve._is_loopback(host) == alone


def test_options_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(serve, "_run_on_ray", lambda _settings, _address, cluster: started.append(cluster))
    scale = ("--workers", "4", "--min-workers", "0", "--idle", "5", "--gpus-per-worker", "0.5", "--memory", "24GB")
    run("--ray", "--open", "--model", "mini", *scale, *FAST, "--lease", "7", "--many-step", "--data", str(tmp_path))
    expected = ClusterSettings(
        min_workers=0,
        max_workers=4,
        gpus_per_worker=0.5,
        memory="24GB",
        acceleration=FAST_ACCELERATION,
        few_step=False,
        lease_seconds=7.0,
        idle_seconds=5.0,
    )
    assert started == [expected]
    assert expected.worker_device == "cuda"


def test_fewer_workers_than_stay_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="allow at least one worker"):
        run("--ray", "--open", "--model", "mini", "--min-workers", "3", "--workers", "2", "--data", str(tmp_path))


def test_groups_of_a_cluster_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ClusterSettings] = []
    monkeypatch.setattr(serve, "_run_on_ray", lambda _settings, _address, cluster: started.append(cluster))
    common = ("--ray", "--open", "--model", "mini", "--data", str(tmp_path))
    run(*common, "--stage-one-workers", "2", "--stage-two-workers", "7")
    run(*common, "--stage-two-workers", "3")
    run(*common, "--workers", "4")
    found = [[(group.name, group.stages, group.max_workers) for group in cluster.groups] for cluster in started]
    one, two = (JobStage.ONE,), (JobStage.TWO,)
    assert found == [[("StageOne", one, 2), ("StageTwo", two, 7)], [("StageTwo", two, 3)], [("", ALL_STAGES, 4)]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ray", "--stage", "one"), "give --stage-one-workers"),
        (("--stage-one-workers", "1"), "are for --ray"),
        (("--ray", "--stage-two-workers", "2", "--workers", "1"), "leave it out"),
        (("--ray", "--stage-one-workers", "1", "--stage-two-workers", "4", "--min-workers", "2"), "1 workers are"),
    ],
)
def test_stages_that_would_be_ignored_are_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        run("--open", "--model", "mini", *arguments, "--data", str(tmp_path))


def test_workers_are_told_how_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line that `serve` makes is read by `jobs work` itself."""
    commands: list[list[str]] = []
    runners: list[tuple[object, ...]] = []
    served: list[bool] = []

    def stop(*arguments: object, few_step: bool) -> None:
        runners.append((*arguments, few_step))
        raise InvalidInputError("far enough")

    def start(settings: ServiceSettings, _address: object, *, command: list[str], **_options: object) -> None:
        served.append(settings.models[0].defaults.few_step)
        commands.append(command)

    monkeypatch.setattr(serve, "_run", start)
    monkeypatch.setattr(jobs, "pipeline_runner", stop)
    data = ("--data", str(tmp_path / "x y"))
    run("--open", "--model", "mini", "--model", "mini", "--memory", "24GB", *FAST, *data)
    run("--open", "--model", "mini", "--device", "cpu", "--stage", "two", "--many-step", *data)
    for command in commands:
        result = CliRunner().invoke(jobs.app, command[command.index("work") :])
        assert str(result.exception) == "far enough", result.output
    assert runners == [
        (None, "24GB", FAST_ACCELERATION, ALL_STAGES, True),
        ("cpu", None, Acceleration(), (JobStage.TWO,), False),
    ]
    assert served == [True, False]
    assert [command.count("--model") for command in commands] == [2, 1]
    with pytest.raises(InvalidInputError, match="attention 'fast' is not known"):
        run("--open", "--model", "mini", "--attention", "fast", *data)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "gpu", "device 'gpu' is not known; use cpu"),
        ("--decode-device", "cuda:99", "cannot be used"),
        ("--memory", "lots", "write for instance 24GiB"),
    ],
)
def test_options_that_every_worker_would_die_of_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, words: str
) -> None:
    started: list[object] = []
    monkeypatch.setattr(serve, "_run", lambda *_arguments, **_options: started.append(option))
    asked = ("--open", "--model", "mini", option, value, "--data", str(tmp_path))
    with pytest.raises(InvalidInputError, match=words):
        run(*asked)
    assert not started
    run(*asked, "--workers", "0")  # then they are elsewhere, where this may be right
    assert started == [option]
