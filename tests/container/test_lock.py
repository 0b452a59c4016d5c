"""The lock that the image is built from: whole, exact, and in the ranges that the project states."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.container.test_compose import values

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
EXTRAS = dict(value.split("=", 1) for value in values("ARG"))["EXTRAS"].split(",")
PIN = re.compile(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*( ; [^;#]+)?")
PLACES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.4",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": machine,
    }
    for python in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def pins(lock: str) -> dict[str, list[Requirement]]:
    found = defaultdict(list)
    for line in lock.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            pin = Requirement(line)
            found[canonicalize_name(pin.name)].append(pin)
    return found


def version_at(pinned: list[Requirement], place: dict[str, str]) -> str | None:
    """Return the version of a package at a place; None unless there is just one."""
    versions = [next(iter(pin.specifier)).version for pin in pinned if pin.marker is None or pin.marker.evaluate(place)]
    return versions[0] if len(versions) == 1 else None


def problems(project: dict[str, Any], lock: str) -> list[str]:
    """Say what the project asks for and the lock does not give, at any place where the image may be built."""
    wanted = [*project["dependencies"], *(each for extra in EXTRAS for each in project["optional-dependencies"][extra])]
    held, found = pins(lock), []
    for requirement in map(Requirement, wanted):
        for place in PLACES:
            version = version_at(held.get(canonicalize_name(requirement.name), []), place)
            if version is None or not requirement.specifier.contains(version):
                found.append(f"{requirement} is {version} on Python {place['python_version']}")
    return found


def test_the_lock_is_what_the_project_asks_for() -> None:
    assert problems(PROJECT, LOCK) == [], "run: make lock"


@pytest.mark.parametrize(
    ("dependency", "words"),
    [("torch>=99", "torch>=99 is 2."), ("left-pad>=1", "left-pad>=1 is None"), ("diffusers<0.1", "diffusers<0.1 is")],
)
def test_a_lock_that_is_out_of_date_is_found(dependency: str, words: str) -> None:
    changed = PROJECT | {"dependencies": [*PROJECT["dependencies"], dependency]}
    assert words in problems(changed, LOCK)[0]
    extra = PROJECT["optional-dependencies"] | {"serve": [dependency]}
    assert words in problems(PROJECT | {"optional-dependencies": extra}, LOCK)[0]


def test_a_lock_without_a_package_is_found() -> None:
    for name in ("numpy", "sqlalchemy", "pg8000"):
        without = "\n".join(line for line in LOCK.splitlines() if not line.startswith(f"{name}=="))
        assert [text for text in problems(PROJECT, without) if text.startswith(name)]


def test_every_line_is_an_exact_version_from_nowhere_in_particular() -> None:
    """No index, no file, no folder of a machine, no option."""
    lines = [line for line in LOCK.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert not re.search(r"https?:|file:|/(root|home|tmp|work|opt)\b", LOCK)


def test_what_the_locked_packages_need_is_locked() -> None:
    """As far as they are installed here in the version of the lock."""
    held, checked = pins(LOCK), 0
    for name, pinned in held.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.version.split("+")[0] != version_at(pinned, {}):
            continue
        for needed in map(Requirement, installed.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                found = version_at(held.get(canonicalize_name(needed.name), []), {})
                assert found is not None, f"{name} needs {needed}; run: make lock"
                assert needed.specifier.contains(found), f"{name} needs {needed}, the lock has {found}"
                checked += 1
    assert checked > 50


def test_the_image_installs_nothing_else() -> None:
    """Every installation is held to the lock; PyTorch, which has an index of its own, by its line."""
    installing = [command for command in values("RUN") if "pip install" in command]
    assert len(installing) == 3
    for command in installing:
        assert "--constraint requirements.lock" in command or "grep '^torch==' requirements.lock" in command
    assert "--no-build-isolation" in installing[-1], "else what it is built with comes from outside of the lock"
    assert "setuptools" in pins(LOCK)
    assert [pin.name for pin in pins(LOCK)["torch"] if pin.marker is None] == ["torch"], "one line, for grep"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.search(r"^LOCK_EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert wanted is not None
    assert wanted[1].split() == EXTRAS
