"""The annotations say something: few of them are `Any`, and none in what users call.

Run: pytest tests/test_types.py
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import unigen

MOST_ANY = 6.2
"""`Any` in 1,000 lines of the package: the bound falls with the figure, and never rises."""
PUBLIC_ANY = 0
"""`Any` in the annotations of the public names and of their public methods."""


def count_any(source: str) -> int:
    """How often a source says `Any`, its imports aside."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(source)))


def any_per_thousand_lines(sources: list[str]) -> float:
    return 1000 * sum(map(count_any, sources)) / sum(len(source.splitlines()) for source in sources)


def test_any_is_rare_and_becomes_rarer(root: Path) -> None:
    share = any_per_thousand_lines([path.read_text() for path in (root / "unigen").rglob("*.py")])
    assert share <= MOST_ANY, f"{share:.2f} `Any` in 1,000 lines: give the real types"


def test_the_count_sees_any() -> None:
    source = "from typing import Any\n\ndef f(x: Any) -> dict[str, Any]:\n    return {}\n"
    assert count_any(source) == 2 and any_per_thousand_lines([source]) == 500


def public_annotations(value: object, package: str = "unigen") -> dict[str, str]:
    """Annotations by the place that has them: of a function, or of a class, its fields and its public methods.

    Args:
        value: what is public.
        package: only methods that are defined in it count.
    """
    if inspect.isclass(value):
        found = {f"{value.__name__}.{name}": str(hint) for name, hint in inspect.get_annotations(value).items()}
        for name, member in inspect.getmembers(value):
            if not name.startswith("_") or name in ("__init__", "__call__"):
                if module_of(member).startswith(package):
                    found |= {f"{value.__name__}.{k}": hint for k, hint in public_annotations(member, package).items()}
        return found
    if isinstance(value, property):
        value = value.fget
    function = inspect.unwrap(value) if callable(value) else None
    hints = getattr(function, "__annotations__", {})
    return {f"{getattr(function, '__name__', '')}({name})": str(hint) for name, hint in hints.items()}


def module_of(member: object) -> str:
    function = member.fget if isinstance(member, property) else member
    return getattr(function, "__module__", None) or ""


def says_any(hint: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(hint, mode="eval")))


def test_the_public_names_say_their_types() -> None:
    hints: dict[str, str] = {}
    for name in unigen.__all__:
        hints |= public_annotations(getattr(unigen, name))
    assert len(hints) > 20
    vague = {place: hint for place, hint in hints.items() if says_any(hint)}
    assert len(vague) <= PUBLIC_ANY, vague


class Vague:
    field: dict[str, Any]

    def method(self, x: list[Any], y: int) -> str: ...

    @property
    def value(self) -> Any: ...


def test_a_vague_class_is_noticed() -> None:
    vague = {place for place, hint in public_annotations(Vague, __name__).items() if says_any(hint)}
    assert vague == {"Vague.field", "Vague.method(x)", "Vague.value(return)"}
