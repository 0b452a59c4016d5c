"""Strict mapping: round trips of every supported type, and an error with the fix for everything else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swifti2v.config import dump_yaml, from_mapping, load_yaml, to_mapping
from swifti2v.errors import ConfigurationError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Extent(NamedTuple):
    width: int
    height: int


@dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...] = ()
    mode: Literal["fast", "slow", 3] = "fast"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int
    flag: bool
    text: str
    where: Path
    extent: Extent
    colour: Colour
    maybe: float | None = None
    pair: tuple[int, str] = (0, "")
    numbers: list[float] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)
    either: int | str = 0
    derived: int = field(default=7, init=False)


# YAML cannot carry every code point (surrogates, some controls); text that people write it can.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), max_size=12) | st.sampled_from(
    ["1e5", "-2E+3", "yes", "null", "~", "1.0", "0x1f", "2026-01-01", " padded ", "a: b", "# no comment", "1_000"]
)
NUMBERS = st.floats(allow_nan=False)
INNERS = st.builds(
    Inner, rate=NUMBERS, names=st.lists(TEXT, max_size=3).map(tuple), mode=st.sampled_from(["fast", "slow", 3])
)
OUTERS = st.builds(
    Outer,
    inner=INNERS,
    count=st.integers(),
    flag=st.booleans(),
    text=TEXT,
    where=TEXT.filter(lambda text: "\0" not in text).map(Path),
    extent=st.builds(Extent, st.integers(), st.integers()),
    colour=st.sampled_from(Colour),
    maybe=st.none() | NUMBERS,
    pair=st.tuples(st.integers(), TEXT),
    numbers=st.lists(NUMBERS, max_size=3),
    table=st.dictionaries(TEXT, INNERS, max_size=2),
    either=st.integers() | TEXT,
)
MINIMAL: dict[str, Any] = {
    "inner": {"rate": 0.5},
    "count": 3,
    "flag": True,
    "text": "a",
    "where": "b/c",
    "extent": [4, 5],
    "colour": "blue",
}


@given(OUTERS)
@settings(deadline=None)
def test_mapping_and_json_round_trip(value: Outer) -> None:
    assert from_mapping(Outer, to_mapping(value)) == value
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(value)))) == value


@given(OUTERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_yaml_round_trip(tmp_path: Path, value: Outer) -> None:
    path = tmp_path / "value.yaml"
    dump_yaml(value, path)
    assert load_yaml(Outer, path) == value


def test_defaults_fill_and_forms_are_widened() -> None:
    value = from_mapping(Outer, MINIMAL | {"inner": {"rate": 1, "names": ["x"]}, "numbers": (1, 2.5)})
    assert value.inner == Inner(rate=1.0, names=("x",))
    assert isinstance(value.inner.rate, float)
    assert value.numbers == [1.0, 2.5]
    assert isinstance(value.where, Path)
    assert value.extent.width == 4
    assert value.colour is Colour.BLUE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cuont": 1}, ["unknown key 'cuont'", "'count'"]),
        ({"derived": 1}, ["unknown key 'derived'"]),
        ({"inner": {"rate": 1.0, "naems": []}}, ["inner: unknown key 'naems'", "'names'"]),
        ({"inner": {}}, ["inner", "'rate' is missing"]),
        ({"inner": 3}, ["inner", "mapping of the fields of Inner"]),
        ({"count": "3"}, ["count", "'3' is not int"]),
        ({"count": True}, ["count", "True is not int"]),
        ({"count": 3.0}, ["count", "3.0 is not int"]),
        ({"flag": 1}, ["flag", "1 is not bool"]),
        ({"maybe": "x"}, ["maybe", "'x' is not float"]),
        ({"numbers": "12"}, ["numbers", "not a list"]),
        ({"numbers": [1, "2"]}, ["numbers[1]", "'2' is not float"]),
        ({"numbers": [10**400]}, ["numbers[0]", "is not float"]),
        ({"pair": [1]}, ["pair", "list of 2 values"]),
        ({"extent": {"width": 1}}, ["extent", "width, height"]),
        ({"colour": "green"}, ["colour", "'red', 'blue'"]),
        ({"table": {"a": {"rate": "x"}}}, ["table.a.rate", "'x' is not float"]),
        ({"table": {1: {}}}, ["table", "text keys"]),
        ({"either": 1.5}, ["either", "int or str"]),
        ({"inner": {"rate": 1.0, "mode": "quick"}}, ["inner.mode", "'fast', 'slow', 3"]),
        ({"inner": {"rate": 1.0, "mode": 3.0}}, ["inner.mode", "3.0 is not one of"]),
        ({"inner": {"rate": 1.0, "names": "abc"}}, ["inner.names", "not a list"]),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_mapping(Outer, MINIMAL | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_messages_start_with_the_place() -> None:
    with pytest.raises(ConfigurationError, match=r"^run\.train\.count: 'x' is not int"):
        from_mapping(Outer, MINIMAL | {"count": "x"}, where="run.train")


def test_values_that_the_dataclass_refuses_are_configuration_errors() -> None:
    @dataclass(frozen=True)
    class Positive:
        steps: int

        def __post_init__(self) -> None:
            if self.steps < 1:
                msg = f"steps is {self.steps}; it must be at least 1"
                raise ValueError(msg)

    with pytest.raises(ConfigurationError, match=r"^recipe: steps is 0; it must be at least 1$"):
        from_mapping(Positive, {"steps": 0}, where="recipe")


def test_types_without_a_plain_form_are_refused_both_ways() -> None:
    @dataclass
    class Odd:
        value: bytes

    with pytest.raises(ConfigurationError, match="type bytes cannot be read"):
        from_mapping(Odd, {"value": "x"})
    with pytest.raises(ConfigurationError, match="type bytes has no plain form"):
        to_mapping(Odd(b"x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count: 1\ncount: 2\n", ["given twice", "line 2"]),
        ("a: [1, 2", ["is not YAML"]),
        ("- 1\n- 2\n", ["mapping of the fields"]),
        ("inner: {rate: 1}\ncoutn: 2\n", ["unknown key 'coutn'"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load_yaml(Outer, path)
    message = str(caught.value)
    assert "recipe.yaml" in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*missing\.yaml"):
        load_yaml(Outer, tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigurationError, match="is not YAML"):
        load_yaml(Outer, binary)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text("rate: 1e-4\nnames: ['1e-4', b]\n", encoding="utf-8")
    assert load_yaml(Inner, path) == Inner(rate=1e-4, names=("1e-4", "b"))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    @dataclass
    class AllDefaults:
        steps: int = 4

    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert load_yaml(AllDefaults, path) == AllDefaults()
