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


class Color(Enum):
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
class First:
    name: Literal["a"] = "a"
    size: int = 1


@dataclass(frozen=True)
class Second:
    name: Literal["b"] = "b"
    size: int = 2


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int
    flag: bool
    text: str
    where: Path
    extent: Extent
    color: Color
    maybe: float | None = None
    pair: tuple[int, str] = (0, "")
    numbers: list[float] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)
    either: int | str = 0
    kind: First | Second = field(default_factory=First)


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
    color=st.sampled_from(Color),
    maybe=st.none() | NUMBERS,
    pair=st.tuples(st.integers(), TEXT),
    numbers=st.lists(NUMBERS, max_size=3),
    table=st.dictionaries(TEXT, INNERS, max_size=2),
    either=st.integers() | TEXT,
    kind=st.builds(First, size=st.integers()) | st.builds(Second, size=st.integers()),
)
MINIMAL: dict[str, Any] = {
    "inner": {"rate": 0.5},
    "count": 3,
    "flag": True,
    "text": "a",
    "where": "b/c",
    "extent": [4, 5],
    "color": "blue",
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
    assert value.color is Color.BLUE


@pytest.mark.parametrize(
    ("change", "param", "place"),
    [
        ({"cuont": 1}, "cuont", "unknown key 'cuont'; did you mean 'count'?"),
        ({"inner": {"rate": 1.0, "naems": []}}, "naems", "inner: unknown key 'naems'; did you mean 'names'?"),
        ({"table": {"a": {"rate": 1, "naem": 1}}}, "naem", "table.a: unknown key 'naem'; did you mean 'names'?"),
        ({"kind": {"name": "b", "sise": 2}}, "sise", "kind.Second: unknown key 'sise'; did you mean 'size'?"),
        ({"inner": {}}, "rate", "inner: key 'rate' is missing"),
        ({"inner": 3}, "inner", "inner: 3"),
        ({"count": "3"}, "count", "count: '3'"),
        ({"count": True}, "count", "count: True"),
        ({"count": 3.0}, "count", "count: 3.0"),
        ({"flag": 1}, "flag", "flag: 1"),
        ({"maybe": "x"}, "maybe", "maybe: 'x'"),
        ({"numbers": "12"}, "numbers", "numbers: '12'"),
        ({"numbers": [1, "2"]}, "1", "numbers[1]: '2'"),
        ({"pair": [1]}, "1", "pair: key 1 is missing"),
        ({"color": "green"}, "color", "color: 'green'"),
        ({"table": {"a": {"rate": "x"}}}, "rate", "table.a.rate: 'x'"),
        ({"table": {1: {}}}, None, "key 1 is not text"),
        ({"either": 1.5}, "int", "either.int: 1.5"),
        ({"inner": {"rate": 1.0, "mode": "quick"}}, "mode", "inner.mode: 'quick'"),
        ({"kind": {"name": "c"}}, "name", "kind.First.name: 'c'"),
    ],
)
@pytest.mark.parametrize("where", ["", "run.train", "recipe.yaml"])
def test_wrong_values_are_named_with_their_place(
    change: dict[str, Any], param: str | None, place: str, where: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_mapping(Outer, MINIMAL | change, where=where)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.param == param
    assert message.startswith(where)
    assert message.removeprefix(where).removeprefix(":").lstrip(" .").startswith(place)


def test_members_of_a_union_are_told_apart_by_their_literal() -> None:
    assert from_mapping(Outer, MINIMAL | {"kind": {"name": "b"}}).kind == Second()
    assert from_mapping(Outer, MINIMAL | {"kind": {"size": 4}}).kind == First(size=4)  # left out: the first is meant


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count: 1\ncount: 2\n", ["given twice", "line 2"]),
        ("a: [1, 2", ["is not YAML"]),
        ("- 1\n- 2\n", ["cannot be used"]),
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
