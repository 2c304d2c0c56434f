"""The pages of `docs/reference`: they have every public name, and every name there says what it is.

Run: pytest tests/test_reference.py
"""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import unigen


def identifiers(root: Path) -> list[str]:
    """The names that the pages show: `::: unigen.load`."""
    pages = sorted((root / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


def resolve(name: str) -> object:
    """The module, class or function of a dotted name."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        owner, _, attribute = name.rpartition(".")
        return getattr(resolve(owner), attribute)


def undocumented(value: object, name: str) -> list[str]:
    """Public names of a module or class that have no docstring, and the value itself where it has none."""
    missing = [] if inspect.getdoc(value) else [name]
    if isinstance(value, ModuleType):
        members = {k: v for k, v in vars(value).items() if getattr(v, "__module__", None) == value.__name__}
    elif inspect.isclass(value):
        members = {k: getattr(v, "__func__", v) for k, v in vars(value).items()}
    else:
        return missing
    for key, member in members.items():
        if not key.startswith("_") and (callable(member) or isinstance(member, property)):
            missing += undocumented(member, f"{name}.{key}")
    return missing


def test_the_reference_has_every_public_name(root: Path) -> None:
    assert {f"unigen.{name}" for name in unigen.__all__} <= set(identifiers(root))


def test_every_name_of_the_reference_says_what_it_is(root: Path) -> None:
    names = identifiers(root)
    assert len(names) > 5 and len(set(names)) == len(names)
    missing = [bare for name in names for bare in undocumented(resolve(name), name)]
    assert not missing, f"without a docstring: {', '.join(missing)}"


def excused_paths(packaging: str) -> list[str]:
    """Paths of the package that are excused from rules of ruff."""
    ignores = tomllib.loads(packaging)["tool"]["ruff"]["lint"]["per-file-ignores"]
    return [path for path, rules in ignores.items() if path.startswith("unigen") and rules]


def test_no_room_is_excused_from_docstrings(root: Path) -> None:
    packaging = (root / "pyproject.toml").read_text()
    assert excused_paths(packaging) == []
    rules = "[tool.ruff.lint.per-file-ignores]\n"
    assert excused_paths(packaging.replace(rules, rules + '"unigen/hub/**" = ["D"]\n')) == ["unigen/hub/**"]


class Bare:
    """One of two methods has no docstring."""

    def documented(self) -> None:
        """Nothing."""

    def undocumented(self) -> None: ...


def test_a_bare_name_and_one_that_is_gone_are_noticed() -> None:
    assert undocumented(Bare, "Bare") == ["Bare.undocumented"]
    with pytest.raises(AttributeError):
        resolve("unigen.generators.base.Nonesuch")
