"""The rules of CONTRIBUTING that no linter checks, over the whole tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "swifti2v"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

MAX_FUNCTION_LINES = 100
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "stuff"}
ENVIRONMENT = re.compile(r"\bos\.(environ|getenv|putenv)\b|\bfrom os import .*\b(environ|getenv)\b")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def joined(pairs: list[set[str]]) -> list[list[str]]:
    """Return the modules of pairs that share one as sorted lists."""
    groups: list[set[str]] = []
    for pair in pairs:
        shared = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*shared)]
    return sorted(map(sorted, groups))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 10
    assert len(TESTS) > 5
    assert len(BENCHMARKS) > 5


def test_functions_are_short() -> None:
    long = [
        f"{name(path)}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1} lines"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, f"split these functions, they hold more than {MAX_FUNCTION_LINES} lines: {long}"


def test_names_say_something() -> None:
    parts = {part.removesuffix(".py").strip("_") for path in FILES for part in path.relative_to(SOURCE).parts}
    assert not parts & EMPTY_NAMES, "name the thing that the module is about"


def test_the_environment_is_read_by_the_command_line_only() -> None:
    readers = [
        name(path)
        for path in FILES
        if path.relative_to(SOURCE).parts[0] != "cli" and ENVIRONMENT.search(path.read_text(encoding="utf-8"))
    ]
    assert not readers, f"pass the value in from `cli` instead: {readers}"


def test_every_package_is_marked() -> None:
    folders = {path.parent for path in FILES}
    assert not [name(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_annotations_are_not_evaluated() -> None:
    """One rule for all files, so that type-only imports can stay type-only."""
    line = "from __future__ import annotations"
    lacking = [name(path) for path in FILES + TESTS if lines(path) > 1 and line not in path.read_text(encoding="utf-8")]
    assert not lacking


def test_exceptions_to_the_linter_give_a_reason() -> None:
    """``# noqa: CODE - why``; the same for type checks."""
    pattern = re.compile(r"#\s*(noqa\b(?!: [A-Z0-9, ]+ - \S)|type: ignore\b(?!\[[a-z, -]+\]))")
    bare = [
        f"{name(path)}:{number}"
        for path in FILES + [test for test in TESTS if test != Path(__file__)]
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(text)
    ]
    assert not bare, f"name the rule and say why: {bare}"


def test_tests_mirror_the_source() -> None:
    """A test file stands where its module stands; folders of another kind are listed."""
    other = {"equivalence", "contract", "gpu", "end_to_end", "benchmarks", "container", "examples", "integrations"}
    modules = {path.stem for path in SOURCE.glob("*.py")}  # tests of one may fill a folder
    strays = [
        name(path)
        for path in TESTS
        if (parts := path.relative_to(ROOT / "tests").parts)[1:]
        and parts[0] not in other
        and not (SOURCE / parts[0]).is_dir()
        and parts[0] not in modules
    ]
    assert not strays


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for type checking count: who reads one of the files needs the others."""
    graph = grimp.build_graph("swifti2v", exclude_type_checking_imports=False, cache_dir=None)
    circles = [
        {importer, imported}
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if importer != imported and graph.chain_exists(importer=imported, imported=importer)
    ]
    assert not circles, f"move what both need below them: {joined(circles)}"


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/design.md", "docs/log.md"])
def test_documents_name_no_place_of_one_machine(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(r"(^|[^A-Za-z0-9_.])/(work|root|opt|tmp|home)/[a-z]", text)
