"""What the README and the guide show is real: commands parse, files exist, Python names and keywords exist.

Run: pytest tests/test_readme.py
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import unigen
from unigen.commands.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, block) of every fenced block in the language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text())]


def command_lines() -> list[tuple[str, str]]:
    return [(page, line) for page, block in blocks("bash") for line in block.splitlines() if line.strip()]


def check_command(line: str) -> None:
    """Raises where the line would not run: ValueError for bad arguments, AssertionError for missing files."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    program, rest = words[0], words[1:]
    if program == "unigen":
        check_unigen(rest)
    elif program.startswith("scripts/"):
        assert (ROOT / program).stat().st_mode & 0o111, f"{program} cannot be run"
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"there is no {rest[1]}"
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {rest[0]}"
    elif program == "apt-get":
        assert rest[0] == "install" and len(rest) > 1
    elif program == "python":
        source = (ROOT / rest[0]).read_text()
        missing = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{rest[0]} has no {missing}"
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", line)
        packaging = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", packaging, re.MULTILINE) for extra in extras)
    else:
        assert (program, rest) == ("source", [".venv/bin/activate"]), f"what is {program}?"


def check_unigen(words: list[str]) -> None:
    name, rest = words[0], words[1:]
    assert name in COMMANDS, name
    if name == "eval":
        from unigen.commands import eval as eval_command
        from unigen.evaluation.runner import find_task

        eval_command.build_parser(rest[0], find_task(rest[0])).parse_args(rest[1:])
        return
    args = build_parser(name).parse_args(rest)
    if name == "train":
        from unigen.config import apply_overrides
        from unigen.training.recipe_files import find_recipe

        apply_overrides(recipe(find_recipe(args.recipe)).config(), args.overrides)


def recipe(path: Path) -> Any:
    name = f"readme_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_are_real(page: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "unigen draw x",
        "unigen generate x --colour red",
        "unigen eval nonesuch",
        "unigen eval scenes --nonesuch",
        "unigen train recipes/tiny.py nonesuch=1",
        "scripts/nonesuch.sh",
        "python data_tools/make_scenes.py x --nonesuch",
        "pip install -e '.[nonesuch]'",
        "make it",
    ],
)
def test_the_check_can_fail(line: str) -> None:
    with pytest.raises((AssertionError, ValueError, OSError, ImportError)):
        check_command(line)


def check_python(source: str) -> None:
    """Names of unigen and methods of the engine exist, and take the keywords that are given."""
    from unigen.inference.engine import Engine
    from unigen.inference.request import build_request

    allowed = {word for method in (build_request, Engine.generate, Engine.generate_batch, Engine.stream)
               for word in inspect.signature(method).parameters}  # fmt: skip
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "unigen":
            assert hasattr(unigen, node.attr), node.attr
        elif node.value.id == "engine":
            assert hasattr(Engine, node.attr), node.attr
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "engine":
                unknown = {keyword.arg for keyword in node.keywords} - allowed
                assert not unknown, f"engine.{node.func.attr} takes no {unknown}"


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_python_is_real(page: str, block: str) -> None:
    check_python(block)


@pytest.mark.parametrize("source", ["engine.sing()", "unigen.nonesuch", "engine.generate('x', guidence=3)"])
def test_the_python_check_can_fail(source: str) -> None:
    with pytest.raises(AssertionError):
        check_python(source)


def test_links_and_folders_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    where = (ROOT / "docs" / "guide.md").read_text().split("## Where things are")[1]
    rows = re.findall(r"^\| `([\w/.]+)` \|", where, re.MULTILINE)
    assert len(rows) > 5 and all((ROOT / row).exists() for row in rows)


def missing_paths(page: str) -> set[str]:
    """Files and folders in backticks that do not exist, but those made up for an example: my_..., or in capitals."""
    paths = re.findall(r"`((?:unigen|tests|recipes|scripts|docs|examples)/[\w./-]+)`", page)
    return {path for path in paths if not re.search(r"my_|[A-Z]{3}", path) and not (ROOT / path).exists()}


def test_what_contributors_are_told_exists() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert not missing_paths(page)
    assert missing_paths(page.replace("unigen/models/liquid.py", "unigen/models/gone.py")) == {"unigen/models/gone.py"}


def test_the_readme_counts_the_world_right() -> None:
    from unigen.toyworld.objects import BACKGROUNDS, COLORS, MAX_COUNT, OBJECT_EMOJI

    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"{len(OBJECT_EMOJI)} kinds of things, {len(COLORS)} tints, {len(BACKGROUNDS)} backgrounds" in said
    assert f"up to {MAX_COUNT} things" in said
