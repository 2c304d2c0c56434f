"""Running a recipe file: its inputs are checked before anything heavy is imported, then it is built and trained.

    run_recipe("recipes/tiny.py", ["steps=100", "optim.lr=1e-4"])

A recipe is a Python file with config(), which returns a RunConfig, and build(cfg), which returns a TrainSpec. A plain
table may name the fields whose values are files or folders that another command makes, with that command:

    INPUTS = {"image_tokenizer": "unigen train recipes/tiny_vq.py run_dir=runs/vq"}
    INPUTS_OPTIONAL_WITH = ("init_from", "generators")    # an override of one of these: the defaults may be missing
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from unigen.config import OptimConfig, RunConfig, apply_overrides, renamed_keys
from unigen.training.launcher import check_launcher, launch_info
from unigen.utils import progress
from unigen.utils.disk import check_input
from unigen.utils.extras import require_extra

T = TypeVar("T")


def run_recipe(path: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Load a recipe file, apply overrides, build and train.

    Args:
        path: of the recipe file.
        overrides: `key=value` texts; an unknown key is an error.

    Returns:
        The final metrics, as `Trainer.run`.

    Raises:
        ValueError: the file is no recipe, an input is not there, an override is wrong, or `Trainer.run` raises it; in
            one line.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise ValueError(f"no recipe at {path}: give the path of a Python file with config() and build(cfg)")
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the recipe {path} is not valid Python: {error}") from error
    check_launcher()
    require_extra("train", "accelerate", "tensorboard")
    check_inputs(path, tree, overrides)
    main = launch_info().rank == 0
    name = f"unigen_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that the recipe's dataclasses and classes resolve, also in workers
    with progress.status(f"loading {path}") if main else nullcontext():
        spec.loader.exec_module(module)
    for function in ("config", "build"):
        if not callable(getattr(module, function, None)):
            raise ValueError(f"the recipe {path} has no function {function}(); it needs config() and build(cfg)")
    cfg = apply_overrides(_call_checked(path, "config()", RunConfig, module.config), overrides)

    from unigen.training.checkpoint import lock_run
    from unigen.training.stream import seed_all
    from unigen.training.train_spec import TrainSpec
    from unigen.training.trainer import Trainer

    with lock_run(cfg.run_dir, main):
        seed_all(cfg.seed)  # so that the first weights are a function of the configuration
        return Trainer(cfg, _call_checked(path, "build(cfg)", TrainSpec, module.build, cfg)).run()


ARGUMENT_RENAMES = {
    "TrainSpec": {"sample": "write_samples", "save": "save_model", "optimizer": "make_optimizer"},
    "RunConfig": renamed_keys(RunConfig),
    "OptimConfig": renamed_keys(OptimConfig),
}
"""Names of arguments in version 0.1, and their names now, by class."""


def _call_checked(path: str, call: str, kind: type[T], function: Callable[..., object], *arguments: object) -> T:
    """Call a function of the recipe at `path`. ValueError where its result is not of the kind."""
    try:
        result = function(*arguments)
    except TypeError as error:
        match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        renames = ARGUMENT_RENAMES.get(match[1], ARGUMENT_RENAMES["RunConfig"]) if match else {}
        if match is None or match[2] not in renames:
            raise
        raise ValueError(
            f"the recipe {path} gives {match[1]} {match[2]}=, which is {renames[match[2]]}= now"
        ) from error
    if not isinstance(result, kind):
        raise ValueError(f"{call} of the recipe {path} must return a {kind.__name__}, not a {type(result).__name__}")
    return result


def check_inputs(path: str, tree: ast.Module, overrides: Sequence[str]) -> None:
    """Check the INPUTS of a recipe, read from its text, before it is imported.

    A field without an override has its default. A default may be missing where an override has one of the keys in
    INPUTS_OPTIONAL_WITH: `build` reports then what is missing.

    Args:
        path: of the recipe, for messages.
        tree: the parsed recipe.
        overrides: `key=value` texts.

    Raises:
        ValueError: a file or folder is missing, with the command that makes it; or a key has changed name.
    """
    overrides_by_key = {key.strip(): value.strip() for key, _, value in (item.partition("=") for item in overrides)}
    renamed = _renamed_fields(tree)
    for key in overrides_by_key:
        head, dot, tail = key.partition(".")
        if head in renamed:
            raise ValueError(f"unknown key {key!r}; it is called {renamed[head]}{dot}{tail} now")
    _, alternatives = _constant(tree, "INPUTS_OPTIONAL_WITH", ("init_from",))
    has_alternative = isinstance(alternatives, tuple) and any(k.split(".")[0] in alternatives for k in overrides_by_key)
    for key, command in _inputs(path, tree).items():
        value = overrides_by_key.get(key, "none" if has_alternative else _default(tree, key))
        paths = [value] if os.path.exists(value) else value.split(",")
        for input_path in paths if value.lower() not in ("none", "null", "") else ():
            check_input(input_path, command, f"{key}=")


def _inputs(path: str, tree: ast.Module) -> dict[str, str]:
    """Return INPUTS of the recipe at `path`; {} where it has none. ValueError where it is no plain table of texts."""
    line, inputs = _constant(tree, "INPUTS", {})
    if not isinstance(inputs, dict) or not all(isinstance(text, str) for pair in inputs.items() for text in pair):
        raise ValueError(
            f"INPUTS of the recipe {path}, in line {line}, must be a dict of plain texts, as "
            '{"field": "the command that makes it"}, since it is read before the recipe is run'
        )
    return inputs


def _constant(tree: ast.Module, name: str, default: object) -> tuple[int, object]:
    """Return line and value of a constant, read from the text of a recipe.

    The value is None where it is no literal, and `default` where the constant is missing.
    """
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if value is None or [t.id for t in targets if isinstance(t, ast.Name)] != [name]:
            continue
        try:
            return node.lineno, ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that its documentation names
            return node.lineno, None
    return 0, default


def _renamed_fields(tree: ast.Module) -> dict[str, str]:
    """Return old and new names of fields: RENAMED of the recipe's classes, read from its text."""
    renamed: dict[str, str] = {}
    for node in (inner for outer in tree.body if isinstance(outer, ast.ClassDef) for inner in outer.body):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RENAMED" and node.value is not None:
            with suppress(ValueError):
                renamed |= ast.literal_eval(node.value)
    return renamed


def _default(tree: ast.Module, field: str) -> str:
    """Return the default of a field in a dataclass of the recipe, where it is a text, else "none"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == field:
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
    return "none"
