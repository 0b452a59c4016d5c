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
    *("--decoder", "light", "--decoder-weights", "w"),
)
FAST_ACCELERATION = Acceleration(
    "native", compile_blocks=True, decoder="light", decoder_weights="w", decode_device="cpu"
)
MINI = ("--open", "--model", "mini")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(serve.app, arguments)
    if isinstance(result.exception, SwiftI2VError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    return ("--data", str(tmp_path / "x y"))


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> list[ClusterSettings]:
    """The clusters that would have been started."""
    started: list[ClusterSettings] = []
    monkeypatch.setattr(serve, "_run_on_ray", lambda _settings, _address, cluster: started.append(cluster))
    return started


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServiceSettings, list[str]]]:
    """The services that would have been started, with the command of their workers."""
    started: list[tuple[ServiceSettings, list[str]]] = []

    def start(settings: ServiceSettings, _address: object, *, command: list[str], **_options: object) -> None:
        started.append((settings, command))

    monkeypatch.setattr(serve, "_run", start)
    return started


def test_keys_are_made_and_taken_away(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    key = run("add-key", "ann", "--max-active-jobs", "2", *data).strip()
    file = KeyFile(tmp_path / "data" / "keys.json")
    found = file.find(key)
    assert found is not None
    assert (found.name, found.max_active_jobs) == ("ann", 2)
    assert run("remove-key", "ann", *data) == "ann: removed\n"
    assert file.find(key) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])  # noqa: S104 - it is refused
def test_others_are_not_served_without_keys(data: tuple[str, str], host: str) -> None:
    assert not serve.is_loopback(host)
    with pytest.raises(InvalidInputError, match="add-key"):
        run("--host", host, "--model", "mini", *data)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_loopback_is_served_and_asks_for_the_first_key(
    data: tuple[str, str], services: list[tuple[ServiceSettings, list[str]]], host: str
) -> None:
    run("--host", host, "--model", "mini", "--allow-origin", "https://a.example", "--root-path", "/video/", *data)
    ((settings, _command),) = services
    assert settings.keys == settings.data / "keys.json"
    assert (settings.allowed_origins, settings.root_path) == (("https://a.example",), "/video")


def test_options_of_a_cluster(data: tuple[str, str], clusters: list[ClusterSettings]) -> None:
    scale = ("--workers", "4", "--min-workers", "0", "--idle", "5", "--gpus-per-worker", "0.5", "--memory", "24GB")
    run("--ray", *MINI, *scale, *FAST, "--lease", "7", "--many-step", *data)
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
    assert clusters == [expected]
    assert expected.worker_device == "cuda"


def test_groups_of_a_cluster_by_stage(data: tuple[str, str], clusters: list[ClusterSettings]) -> None:
    for scale in (("--stage-one-workers", "2", "--stage-two-workers", "7"), ("--stage-two-workers", "3"), ()):
        run("--ray", *MINI, *data, *scale)
    found = [[(group.name, group.stages, group.max_workers) for group in cluster.groups] for cluster in clusters]
    one, two = (JobStage.ONE,), (JobStage.TWO,)
    assert found == [[("StageOne", one, 2), ("StageTwo", two, 7)], [("StageTwo", two, 3)], [("", ALL_STAGES, 1)]]


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (("--ray", "--stage", "one"), "stage"),
        (("--stage-one-workers", "1"), "stage_one_workers"),
        (("--ray", "--stage-two-workers", "2", "--workers", "1"), "workers"),
        (("--ray", "--stage-one-workers", "1", "--stage-two-workers", "4", "--min-workers", "2"), "min_workers"),
        (("--ray", "--min-workers", "3", "--workers", "2"), "min_workers"),
    ],
)
def test_workers_that_cannot_be_are_refused(data: tuple[str, str], arguments: tuple[str, ...], param: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        run(*MINI, *arguments, *data)
    assert caught.value.param == param


def test_workers_are_told_how_to_work(
    data: tuple[str, str], services: list[tuple[ServiceSettings, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line that `serve` makes is read by `jobs work` itself."""
    runners: list[tuple[object, ...]] = []

    def stop(*arguments: object, few_step: bool) -> None:
        runners.append((*arguments, few_step))
        raise InvalidInputError("far enough")

    monkeypatch.setattr(jobs, "pipeline_runner", stop)
    run(*MINI, "--model", "mini", "--memory", "24GB", *FAST, *data)
    run(*MINI, "--device", "cpu", "--stage", "two", "--many-step", *data)
    for _settings, command in services:
        result = CliRunner().invoke(jobs.app, command[command.index("work") :])
        assert str(result.exception) == "far enough", result.output
    assert runners == [
        (None, "24GB", FAST_ACCELERATION, ALL_STAGES, True),
        ("cpu", None, Acceleration(), (JobStage.TWO,), False),
    ]
    assert [settings.models[0].defaults.few_step for settings, _command in services] == [True, False]
    assert [command.count("--model=mini") for _settings, command in services] == [2, 1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "gpu"), ("--decode-device", "cuda:99"), ("--memory", "lots"), ("--attention", "fast")],
)
def test_options_that_every_worker_would_die_of_are_refused(
    data: tuple[str, str], services: list[tuple[ServiceSettings, list[str]]], option: str, value: str
) -> None:
    with pytest.raises(InvalidInputError):
        run(*MINI, option, value, *data)
    assert not services
    if option != "--attention":
        run(*MINI, option, value, *data, "--workers", "0")  # then they are elsewhere, where this may be right
        assert len(services) == 1
