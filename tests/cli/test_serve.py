"""`swifti2v serve`: what it refuses, and its keys; the server itself runs in `tests/serving/test_end_to_end.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from swifti2v.cli import serve
from swifti2v.errors import InvalidInputError, SwiftI2VError
from swifti2v.serving.keys import KeyFile

if TYPE_CHECKING:
    from pathlib import Path


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


def test_workers_are_named_their_models(tmp_path: Path) -> None:
    command = serve._worker_command(["mini", "wan2.2"], ["--data", "x y"])
    assert command[-6:] == ["--model", "mini", "--model", "wan2.2", "--data", "x y"]
