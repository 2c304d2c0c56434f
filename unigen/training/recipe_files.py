"""Finding recipes by the path of a file, or by the name of a shipped recipe. Nothing here imports or runs one.

In a checkout the shipped recipes are in `recipes/`; in an installed package, in `unigen/recipes/`.

    find_recipe("tiny")                       # .../recipes/tiny.py
    find_recipe("my/own.py")                  # my/own.py
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

from unigen.utils.text import did_you_mean

PACKAGE_ROOT = Path(__file__).parents[1]
RENAMED = {"adapter": "connector"}
"""Names of shipped recipes in version 0.1, and their names now."""


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by name: the Python files that define `config` and `build`."""
    installed = PACKAGE_ROOT / "recipes"
    folder = installed if installed.is_dir() else PACKAGE_ROOT.parent / "recipes"
    recipes: dict[str, Path] = {}
    for path in sorted(folder.glob("*.py")):
        functions = {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        if {"config", "build"} <= functions:
            recipes[path.stem] = path
    return recipes


def find_recipe(name: str) -> Path:
    """Find the file of a recipe.

    Args:
        name: path of a recipe file; or the name of a shipped recipe, such as "tiny" or "recipes/tiny.py".

    Returns:
        The path of the file.

    Raises:
        ValueError: the name is neither, or has changed; the message lists the shipped recipes.
    """
    path = Path(name)
    if os.path.isfile(path):
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path in (Path(path.stem), Path(f"{path.stem}.py"), Path(f"recipes/{path.stem}.py")):
        return shipped[path.stem]
    if path.stem in RENAMED and path in (Path(path.stem), Path(f"{path.stem}.py"), Path(f"recipes/{path.stem}.py")):
        raise ValueError(f"the recipe {path.stem} is called {RENAMED[path.stem]} now")
    recipe_list = f" (shipped recipes: {', '.join(shipped)})" if shipped else ""
    shortened_name = name if len(name) <= 120 else f"{name[:117]}..."
    raise ValueError(
        f"no recipe {shortened_name}: give the path of a recipe file or a "
        f"name{did_you_mean(name, shipped)}{recipe_list}"
    )
