"""The command `train`: `unigen train tiny steps=1000`."""

from __future__ import annotations

import argparse

from unigen.utils.extras import require_extra
from unigen.utils.text import docstring_summary

HELP = "run a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen train`, with the shipped recipes in the help text."""
    from unigen.training.recipe_files import shipped_recipes

    parser.add_argument("recipe", help="name of a shipped recipe, or path of a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=1000 optim.lr=1e-4")
    rows = [f"  {name:<16} {docstring_summary(path)}" for name, path in shipped_recipes().items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["shipped recipes:", *rows])


def run(args: argparse.Namespace) -> int:
    """Run the recipe with the user's overrides. Returns the exit code."""
    from unigen.training import run_recipe
    from unigen.training.recipe_files import find_recipe

    recipe = find_recipe(args.recipe)
    require_extra("train", "accelerate", "tensorboard")
    run_recipe(str(recipe), args.overrides)
    return 0
