"""Measured costs are kept: in a table that is shipped with the package, and in a table of the user's own.

What is in neither is measured now (`measure.py`), which takes seconds, and PyTorch is imported for that only.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swifti2v.memory.costs import Answer, Question

SHIPPED_TABLE = "measured_costs.json"
_PACKAGES = ("swifti2v", "torch", "diffusers", "transformers")


def measured(question: Question[Answer]) -> Answer:
    """Return what was measured, now or at an earlier time."""
    answer: Answer = _measured(question)
    return answer


@cache
def _measured(question: Question[Any]) -> Any:
    tables = shipped_table(), user_table()
    name = question.network.digest
    # A configuration may leave out what is the default of its class; which ones are the same, the tables know too.
    complete = next((table["networks"][name] for table in tables if name in table["networks"]), None)
    found = _found(question.key(complete)) if complete is not None else None
    if found is None:
        from swifti2v.memory import measure

        question = replace(question, network=measure.completed(question.network))
        key = question.key(question.network.digest)
        found = _found(key) or asdict(measure.measure(question))
        table = tables[1]
        table["networks"][name] = question.network.digest
        table["costs"][key] = found
        _write_user_table()
    return question.answer(**found)


def _found(key: str) -> dict[str, Any] | None:
    for table in (shipped_table(), user_table()):
        if key in table["costs"]:
            found: dict[str, Any] = table["costs"][key]
            return found
    return None


def user_table_path() -> Path:
    """Return the file of the user's own table: one for each set of versions of the packages that are measured."""
    from huggingface_hub import cached_assets_path

    versions = "-".join(version(name) for name in _PACKAGES)
    return Path(cached_assets_path("swifti2v", "costs")) / f"{versions}.json"


@lru_cache(maxsize=1)
def shipped_table() -> dict[str, Any]:
    """Return the table of the package; `benchmarks/measured_costs.py` writes it."""
    return _read(files("swifti2v.memory").joinpath(SHIPPED_TABLE))


@lru_cache(maxsize=1)
def user_table() -> dict[str, Any]:
    """Return the user's own table: ``networks`` by the digest of a configuration, ``costs`` by their key."""
    return _read(user_table_path())


def _read(path: Any) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none yet, or it was cut off: everything can be measured again
        return {"networks": {}, "costs": {}}
    return table


def _write_user_table() -> None:
    path = user_table_path()
    with suppress(OSError):  # a home that cannot be written costs time, and no more
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(user_table(), indent=1, sort_keys=True), encoding="utf-8")
        partial.replace(path)
