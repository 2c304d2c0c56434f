"""Engines, generators and templates are asked by their contracts, and not what they are.

Run: pytest tests/test_probes.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PROBED = {"engine", "text_engine", "image_engine", "generator", "generators", "model", "template", "lmm", "painter"}
PROBES = {"isinstance", "hasattr", "getattr"}
ALLOWED = {
    "unigen/model/unified.py": "which generators have weights, to register them as modules of torch",
    "unigen/loading.py": "whether the argument `engine` is a string",
}


def probes(source: str) -> list[str]:
    """Calls that ask what an engine, a generator, a model or a template is. An assert, which tells a type, is none."""
    tree = ast.parse(source)
    asserted = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Assert) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in asserted or not node.args:
            continue
        if isinstance(node.func, ast.Name) and node.func.id in PROBES:
            asked = node.args[0]
            while isinstance(asked, ast.Subscript):
                asked = asked.value
            name = asked.id if isinstance(asked, ast.Name) else asked.attr if isinstance(asked, ast.Attribute) else ""
            if name in PROBED:
                found.append(ast.unparse(node))
    return found


def test_nothing_asks_what_an_engine_is(root: Path) -> None:
    files = [path for folder in ("unigen", "scripts", "data_tools") for path in sorted((root / folder).rglob("*.py"))]
    found = {str(path.relative_to(root)): probes(path.read_text()) for path in files}
    assert {name: calls for name, calls in found.items() if calls and name not in ALLOWED} == {}
    assert all(found[name] for name in ALLOWED), "an exception that nothing needs"


@pytest.mark.parametrize(
    "source",
    [
        "if isinstance(engine, Engine): pass",
        "batch = 1 if getattr(self.engine, 'batched', False) else 16",
        "if hasattr(model.generators[name], 'velocity'): pass",
        "isinstance(model.template, SupportsMaskCells)",
    ],
)
def test_the_search_finds_probes(source: str) -> None:
    assert probes(source)


@pytest.mark.parametrize("source", ["assert isinstance(model.backbone, X)", "isinstance(image, str)", "engine.batched"])
def test_the_search_finds_nothing_else(source: str) -> None:
    assert not probes(source)
