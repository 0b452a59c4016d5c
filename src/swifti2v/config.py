"""Strict mapping between dataclasses and plain data (YAML, JSON), by pydantic. Knows no domain.

A dataclass is the schema: its fields are the only keys, its annotations the only types. Nothing is repaired in silence,
except that an int is taken where a float is declared, a list where a tuple is, and a string where a path is; those are
the forms in which YAML and JSON write such values.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from swifti2v.errors import ConfigurationError

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")

FILE_SUFFIXES = (".yaml", ".yml", ".json")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str = "") -> T:
    """Build a dataclass from plain data.

    Args:
        cls: the dataclass.
        mapping: its values by field name; fields with a default may be left out.
        where: where the mapping stands, for messages: a file, or a key such as ``training.optimizer``.

    Raises:
        ConfigurationError: an unknown key (the nearest known one is named), a missing one, a value of another type, or
            a value that the dataclass itself refuses with a `ValueError`; `param` is the key, `value` what it had.
    """
    try:
        # In JSON a list may be a tuple and a string a path, and nothing else is taken for anything else.
        read: T = _adapter(typing.cast("Any", cls)).validate_json(
            json.dumps(_plain(mapping)), strict=True, extra="forbid"
        )
    except ValidationError as error:
        raise _first_problem(cls, error, where) from error
    except TypeError as error:
        msg = f"{_place('', where)}{error}; write text, numbers, lists and mappings with text keys"
        raise ConfigurationError(msg) from error
    return read


def to_mapping(obj: Any) -> dict[str, Any]:
    """Return the plain data of a dataclass, from which `from_mapping` builds an equal one."""
    return typing.cast("dict[str, Any]", to_jsonable_python(obj))


def read_yaml(path: Path) -> Any:
    """Return the plain data of a YAML (or JSON) file; an empty one is an empty mapping.

    Raises:
        ConfigurationError: the file cannot be read or parsed, or has a key twice; the message starts with its name.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - _Loader derives from SafeLoader
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; give an existing YAML file"
        raise ConfigurationError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ConfigurationError(msg) from error
    return {} if data is None else data


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a dataclass from a YAML (or JSON) file; raises as `read_yaml` and `from_mapping`."""
    return from_mapping(cls, read_yaml(path), where=str(path))


def dump_yaml(obj: Any, path: Path) -> None:
    """Write a dataclass to a YAML file that `load_yaml` reads back as an equal object. Keys keep their order."""
    text = yaml.dump(to_mapping(obj), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads ``1e-4`` as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                msg = f"key {key!r} is given twice in line {key_node.start_mark.line + 1}"
                raise yaml.YAMLError(msg)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings which `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    # YAML 1.1 takes 1e-4 for a string because it has no dot; everyone who writes it means the number.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _plain(value: Any) -> Any:
    """Refuse keys that are not text, of which JSON would make text."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            msg = f"key {wrong[0]!r} is not text"
            raise TypeError(msg)
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _first_problem(cls: type, error: ValidationError, where: str) -> ConfigurationError:
    problems = error.errors(include_url=False)
    # Of a union of dataclasses, those are not meant whose literal field, which tells them apart, is another.
    others = [problem["loc"][:-1] for problem in problems if problem["type"] == "literal_error"]
    meant = [each for each in problems if not any(each["loc"][: len(other)] == other for other in others)]
    # A misspelt key may be the reason for a missing one.
    problem = min(meant or problems, key=lambda each: each["type"] != "unexpected_keyword_argument")
    *path, last = problem["loc"] or ("",)
    if problem["type"] not in {"missing", "unexpected_keyword_argument"}:
        path = list(problem["loc"])
    place = _place("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path), where)
    return ConfigurationError(place + _words(cls, problem), param=str(last) or None, value=problem["input"])


def _words(cls: type, problem: ErrorDetails) -> str:
    """Return the problem and its fix, without the place."""
    key = problem["loc"][-1] if problem["loc"] else ""
    if problem["type"] == "missing":
        return f"key {key!r} is missing, and has no default; give it"
    if problem["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(_type_at(cls, problem["loc"][:-1])) if field.init]
        nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)
        return f"unknown key {key!r}; " + (f"did you mean {nearest[0]!r}?" if nearest else "no keys are taken here")
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{problem['input']!r} cannot be used: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _type_at(hint: Any, loc: Sequence[int | str]) -> Any:
    """Return the type at a place of pydantic's, which names the member of a union too."""
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        members = [each for each in typing.get_args(hint) if each is not types.NoneType]
        if len(members) > 1:
            return _type_at(next(each for each in members if each.__name__ == loc[0]), loc[1:])
        hint = members[0]
    if not loc:
        return hint
    if dataclasses.is_dataclass(hint):
        return _type_at(typing.get_type_hints(hint)[str(loc[0])], loc[1:])
    arguments = [each for each in typing.get_args(hint) if each is not ...]
    return _type_at(arguments[loc[0] if isinstance(loc[0], int) and len(arguments) > 1 else -1], loc[1:])


def _place(inner: str, where: str = "") -> str:
    """Return the beginning of a message; a file name is set off from the keys inside it."""
    inner = inner.removeprefix(".")
    joint = ": " if where.endswith(FILE_SUFFIXES) else "."
    return "".join(f"{part}: " for part in [joint.join(filter(None, (where, inner)))] if part)
