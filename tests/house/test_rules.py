"""The rules of the house: what a newcomer may rely on when looking for something.

Import contracts (`setup.cfg`) keep the floors; here stand the rules that a linter does not know.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from house.message_map import machines, members

from protocol import property_names

ROOT = Path(__file__).resolve().parents[2]
LOOSE = {"__init__.py", "config.py", "daemon.py", "private_files.py"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 500, 70


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax trees of the product's modules by their dotted names."""
    paths = [path for top in ("golem", "actors", "protocol") for path in sorted((ROOT / top).rglob("*.py"))]
    return {name_of(path): ast.parse(path.read_text()) for path in paths}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_file_lies_loose() -> None:
    assert {path.name for path in (ROOT / "golem").glob("*.py")} == LOOSE
    tests = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert tests == {"conftest.py", "order.py", "skips.py"}


def test_no_module_is_private() -> None:
    hidden = [name for name in modules() for part in name.split(".") if part.startswith("_") and not part.startswith("__")]
    assert not hidden, "what is private is in a package and not imported from outside"


def test_a_private_name_stays_in_its_module() -> None:
    taken = [
        f"{name}: {node.module}.{alias.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in modules()
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not taken


def test_modules_and_functions_are_short() -> None:
    large = {name for name, tree in modules().items() if tree.body and (tree.body[-1].end_lineno or 0) > MAX_MODULE_LINES}
    assert not large, f"over {MAX_MODULE_LINES} lines: {sorted(large)}"
    long = {
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {sorted(long)}"


def test_a_public_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_a_property_is_named_once() -> None:
    """Elsewhere it is a constant; what documentation and docstrings say is free."""
    names = {value for name, value in vars(property_names).items() if name.isupper()} - {property_names.PLATFORM_ADDRESS}
    assert len(names) > 30
    again = []
    for module, tree in modules().items():
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                again += [f"{module}:{node.lineno}: {name}" for name in names if name in node.value]
    again = [found for found in again if not found.startswith("protocol.property_names:")]
    assert not again


def test_rows_end_in_row() -> None:
    rows = {row.__name__ for machine in machines() for row in members(machine.rows)}
    assert rows
    assert not sorted(name for name in rows if not name.endswith("Row"))


def test_imports_run_in_no_circle() -> None:
    arrows = {name: {one for one in imported(tree) if one in modules() and one != name} for name, tree in modules().items()}
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        rest = list(arrows[start])
        while rest:
            one = rest.pop()
            if one not in seen:
                seen.add(one)
                rest.extend(arrows[one])
        reached[start] = seen
    assert not sorted(name for name in arrows if name in reached[name])


@pytest.mark.parametrize("room", sorted(path.name for path in (ROOT / "golem").iterdir() if (path / "__init__.py").exists()))
def test_a_room_says_what_it_is(room: str) -> None:
    assert ast.get_docstring(modules()[f"golem.{room}"]), f"golem/{room}/__init__.py has no docstring"


def test_files_of_tests_have_names_of_their_own() -> None:
    """Two of one name cannot be collected together: pytest imports them by it."""
    counted = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in counted.items() if times > 1] == []


def test_no_call_of_an_agent_or_a_person_waits_for_a_full_disk() -> None:
    """`System.post` waits until the disk takes something again: who is to be answered with 503 asks instead."""
    edges = [path for room in ("rest", "control") for path in (ROOT / "golem" / room).rglob("*.py")]
    assert edges
    assert not [path.name for path in edges if "system.post(" in path.read_text()]
