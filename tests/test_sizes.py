"""Files and functions of the package stay short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
MAX_TOP_LEVEL_MODULES = 8


def oversized(name: str, source: str) -> list[str]:
    """The file, where it is too long, and its functions that are."""
    found = [name] if len(source.splitlines()) > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                found.append(f"{name}: {node.name}")
    return found


def test_no_file_and_no_function_is_too_long(root: Path) -> None:
    paths = (root / "unigen").rglob("*.py")
    assert [part for path in paths for part in oversized(str(path.relative_to(root)), path.read_text())] == []


def test_the_package_has_few_top_level_modules(root: Path) -> None:
    assert len([*(root / "unigen").glob("*.py")]) <= MAX_TOP_LEVEL_MODULES


def test_long_ones_are_noticed() -> None:
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert oversized("a.py", function) == ["a.py: f"] and not oversized("a.py", function.rpartition("    x")[0])
    assert oversized("a.py", "x = 1\n" * (MAX_FILE_LINES + 1)) == ["a.py"]
