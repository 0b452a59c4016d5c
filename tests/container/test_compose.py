"""Dockerfile and compose file, read as text: there is not everywhere a Docker to build them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from swifti2v.cli.main import app

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
INSTRUCTIONS = [
    re.sub(r"\\\n\s*", "", line).split(maxsplit=1)
    for line in re.findall(r"^[A-Z]+ (?:.*\\\n)*.*$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
]


def values(name: str) -> list[str]:
    return [value for instruction, value in INSTRUCTIONS if instruction == name]


def runs(arguments: list[str]) -> None:
    """Parse a command line of ours, without running it."""
    command: Any = typer.main.get_command(app)
    group = command.get_command(None, arguments[0])
    group.make_context(arguments[0], list(arguments[1:]), resilient_parsing=False)


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_the_commands_are_ours(name: str) -> None:
    runs(COMPOSE["services"][name]["command"])


def test_the_image_runs_the_service_without_rights_and_without_network() -> None:
    runs(json.loads(values("CMD")[-1]))
    assert json.loads(values("ENTRYPOINT")[-1]) == ["swifti2v"]
    last = [name for name, _ in INSTRUCTIONS]
    assert last.index("USER") > max(place for place, name in enumerate(last) if name in ("RUN", "COPY"))
    assert values("USER") == ["swifti2v"]
    assert "HF_HUB_OFFLINE=1" in values("ENV")[-1]
    assert json.loads(values("VOLUME")[0]) == ["/data", "/models"]


def test_the_health_check_asks_a_route_of_ours() -> None:
    (check,) = values("HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    compile(command[2], "health check", "exec")
    assert f":{values('EXPOSE')[0]}/readyz" in command[2]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for value in values("COPY"):
        if value.startswith("--from"):
            continue
        for source in value.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    arguments = dict(value.split("=", 1) for value in values("ARG"))
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])


def test_the_card_is_asked_for_and_volumes_are_named() -> None:
    (device,) = COMPOSE["services"]["service-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    for service in COMPOSE["services"].values():
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
