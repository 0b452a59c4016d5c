"""Strict mapping between dataclasses and plain data (YAML, JSON). Knows no domain.

A dataclass is the schema: its fields are the only keys, its annotations the only types. Nothing is repaired in silence,
except that an int is taken where a float is declared, a list where a tuple is, and a string where a path is; those are
the forms in which YAML and JSON write such values.

Understood are bool, int, float, str, None, `pathlib.Path`, `typing.Any`, `typing.Literal`, unions, ``list[T]``,
``tuple[T, ...]``, ``tuple[A, B]``, ``dict[str, T]``, enums by value, named tuples as lists, and dataclasses of these.
A union of dataclasses is told apart by a field that has one literal in each; where a file leaves it out, the first is
meant.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from swifti2v.errors import ConfigurationError

T = TypeVar("T")

SCALARS = (bool, int, float, str)
MAX_FLOAT = sys.float_info.max
FILE_SUFFIXES = (".yaml", ".yml", ".json")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str = "") -> T:
    """Build a dataclass from plain data.

    Args:
        cls: the dataclass; fields with ``init=False`` are no keys.
        mapping: its values by field name; fields with a default may be left out.
        where: where the mapping stands, for messages: a file, or a key such as ``training.optimizer``.

    Raises:
        ConfigurationError: an unknown key (the nearest known one is named), a missing one, a value of another type, or
            a value that the dataclass itself refuses with a `ValueError`.
    """
    if not isinstance(mapping, Mapping):
        raise _wrong(mapping, f"a mapping of the fields of {cls.__name__}", where)
    fields = {field.name: field for field in dataclasses.fields(typing.cast("Any", cls)) if field.init}
    for key in mapping:
        if key not in fields:
            raise _unknown_key(key, list(fields), where)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _read(hints[name], mapping[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            msg = f"{_place(where)}key {name!r} is missing; {cls.__name__} has no default for it"
            raise ConfigurationError(msg)
    try:
        return cls(**values)
    except ConfigurationError:
        raise
    except ValueError as error:
        msg = f"{_place(where)}{error}"
        raise ConfigurationError(msg) from error


def to_mapping(obj: Any) -> dict[str, Any]:
    """Return the plain data of a dataclass, from which `from_mapping` builds an equal one.

    Raises:
        ConfigurationError: a value has no plain form.
    """
    return {field.name: _write(getattr(obj, field.name), field.name) for field in dataclasses.fields(obj) if field.init}


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a dataclass from a YAML (or JSON) file.

    Raises:
        ConfigurationError: as `from_mapping`, or the file cannot be read or parsed; the message starts with its name.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - _Loader derives from SafeLoader
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; give an existing YAML file"
        raise ConfigurationError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ConfigurationError(msg) from error
    return from_mapping(cls, {} if data is None else data, where=str(path))


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


def _read(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in {typing.Union, types.UnionType}:
        return _read_union(typing.get_args(hint), value, where)
    if origin is typing.Literal:
        for choice in typing.get_args(hint):
            if type(choice) is type(value) and choice == value:
                return value
        raise _wrong(value, f"one of {', '.join(repr(choice) for choice in typing.get_args(hint))}", where)
    if origin in {list, tuple, dict}:
        return _read_container(origin, typing.get_args(hint), value, where)
    return _read_single(hint, value, where)


def _read_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(value) in choices:
        return value
    if (named := _named_by_tag(choices, value, where)) is not None:
        return _read_single(named, value, where)
    others = [choice for choice in choices if choice is not types.NoneType]
    first_error: ConfigurationError | None = None
    for choice in others:
        try:
            return _read(choice, value, where)
        except ConfigurationError as error:
            first_error = first_error or error
    if len(others) == 1 and first_error is not None:
        raise first_error
    raise _wrong(value, " or ".join(_name(choice) for choice in choices), where)


def _named_by_tag(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return the dataclass of a union whose one literal of a field `value` has; None if they have no such field."""
    classes = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if len(classes) < 2 or not isinstance(value, Mapping):
        return None
    hints = [typing.get_type_hints(each) for each in classes]
    for name in hints[0]:
        literals = [
            typing.get_args(each.get(name)) for each in hints if typing.get_origin(each.get(name)) is typing.Literal
        ]
        named = {args[0]: each for args, each in zip(literals, classes, strict=False) if len(args) == 1}
        if len(named) == len(classes):
            if name in value and value[name] not in named:
                raise _wrong(value[name], f"one of {', '.join(map(repr, named))}", _join(where, name))
            return named[value[name]] if name in value else classes[0]
    return None


def _read_container(origin: type, hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(value, "a mapping with text keys", where)
        return {key: _read(hints[1], item, _join(where, key)) for key, item in value.items()}
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(value, "a list", where)
    if origin is list or hints[1:] == (...,):
        return origin(_read(hints[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    return tuple(_read_each(hints, value, where))


def _read_each(hints: Sequence[Any], value: Sequence[Any], where: str) -> list[Any]:
    if len(value) != len(hints):
        raise _wrong(value, f"a list of {len(hints)} values", where)
    return [_read(hint, item, f"{where}[{index}]") for index, (hint, item) in enumerate(zip(hints, value, strict=True))]


def _read_single(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast("type[Any]", hint), value, where=where)
    if _is_named_tuple(hint):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise _wrong(value, f"a list of {', '.join(hint._fields)}", where)
        hints = typing.get_type_hints(hint)
        return hint(*_read_each([hints[name] for name in hint._fields], value, where))
    if isinstance(hint, type) and issubclass(hint, Enum):
        for member in hint:
            if type(member.value) is type(value) and member.value == value:
                return member
        raise _wrong(value, f"one of {', '.join(repr(member.value) for member in hint)}", where)
    return _read_scalar(hint, value, where)


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int and abs(value) < MAX_FLOAT:
        return float(value)
    if hint is types.NoneType and value is None:
        return None
    if hint in SCALARS and type(value) is hint:
        return value
    if hint not in {*SCALARS, Path, types.NoneType}:
        msg = (
            f"{_place(where)}a field of type {_name(hint)} cannot be read from plain data; use one that `config` lists"
        )
        raise ConfigurationError(msg)
    raise _wrong(value, _name(hint), where)


def _write(value: Any, where: str) -> Any:
    if isinstance(value, Enum):
        return value.value
    if value is None or type(value) in SCALARS:
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, list | tuple):
        return [_write(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _write(item, _join(where, key)) for key, item in value.items()}
    msg = f"{_place(where)}a value of type {type(value).__name__} has no plain form; use one that `config` lists"
    raise ConfigurationError(msg)


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _name(hint: Any) -> str:
    if hint is types.NoneType:
        return "nothing"
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)


def _join(where: str, name: str) -> str:
    if not where:
        return name
    # A file name is set off from the keys inside it.
    return f"{where}: {name}" if where.endswith(FILE_SUFFIXES) else f"{where}.{name}"


def _place(where: str) -> str:
    return f"{where}: " if where else ""


def _wrong(value: Any, wanted: str, where: str) -> ConfigurationError:
    return ConfigurationError(f"{_place(where)}{value!r} is not {wanted}; change the value")


def _unknown_key(key: Any, known: list[str], where: str) -> ConfigurationError:
    nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "no keys are taken here"
    return ConfigurationError(f"{_place(where)}unknown key {key!r}; {hint}")
