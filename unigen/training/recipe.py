"""A recipe file: what it needs is looked for before anything heavy is imported, then it is built and trained.

    run_recipe("recipes/tiny.py", ["steps=100", "optim.lr=1e-4"])

A recipe is a Python file with config(), which gives a RunConfig, and build(cfg), which gives a TrainSpec. It may say
which of its fields name files or folders that something else makes, and by which command, in a plain table:

    INPUTS = {"image_tokenizer": "unigen train recipes/tiny_vq.py run_dir=runs/vq"}
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from unigen.config import RunConfig, apply_overrides
from unigen.training.launcher import check_launcher, launch_info
from unigen.utils import progress
from unigen.utils.disk import check_input
from unigen.utils.extras import require_extra

T = TypeVar("T")


def run_recipe(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the recipe file at `path`, apply `key=value` overrides strictly, build and train.

    Returns: the final metrics, as `Trainer.run`. Raises ValueError in one line for a file that is no recipe, an input
    that is not there, a wrong override, and what `Trainer.run` raises it for."""
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
    for needed in ("config", "build"):
        if not callable(getattr(module, needed, None)):
            raise ValueError(f"the recipe {path} has no function {needed}(); it needs config() and build(cfg)")
    cfg = apply_overrides(_call_checked(path, "config()", RunConfig, module.config), overrides)

    from unigen.training.checkpoint import lock_run
    from unigen.training.stream import seed_all
    from unigen.training.train_spec import TrainSpec
    from unigen.training.trainer import Trainer

    with lock_run(cfg.run_dir, main):
        seed_all(cfg.seed)  # so that the first weights are a function of the configuration
        return Trainer(cfg, _call_checked(path, "build(cfg)", TrainSpec, module.build, cfg)).run()


SPEC_RENAMES = {"sample": "write_samples", "save": "save_model", "optimizer": "make_optimizer"}
"""Fields of a TrainSpec as version 0.1 called them, and their names now."""


def _call_checked(path: str, call: str, kind: type[T], function: Callable[..., object], *arguments: object) -> T:
    """What a function of the recipe at `path` returns. ValueError where it is not of the kind."""
    try:
        result = function(*arguments)
    except TypeError as error:
        old = re.search(r"TrainSpec.*unexpected keyword argument '(\w+)'", str(error))
        if old is None or old[1] not in SPEC_RENAMES:
            raise
        raise ValueError(
            f"the recipe {path} gives TrainSpec {old[1]}=, which is {SPEC_RENAMES[old[1]]}= now"
        ) from error
    if not isinstance(result, kind):
        raise ValueError(f"{call} of the recipe {path} must return a {kind.__name__}, not a {type(result).__name__}")
    return result


def check_inputs(path: str, tree: ast.Module, overrides: Sequence[str]) -> None:
    """ValueError where a file or folder of the INPUTS of the recipe at `path` is missing, naming the command that makes
    it.

    Read from the text of the recipe, before its imports. What is not given by an override is the field's default,
    which a model to begin from (init_from) or another choice of writers may do without: `build` says that."""
    overrides_by_key = {key.strip(): value.strip() for key, _, value in (item.partition("=") for item in overrides)}
    has_source = any(key == "init_from" or key.startswith("writers.") for key in overrides_by_key)
    for key, command in _inputs(path, tree).items():
        value = overrides_by_key.get(key, "none" if has_source else _default(tree, key))
        paths = [value] if os.path.exists(value) else value.split(",")
        for given_path in paths if value.lower() not in ("none", "null", "") else ():
            check_input(given_path, command, f"{key}=")


def _inputs(path: str, tree: ast.Module) -> dict[str, str]:
    """INPUTS of the recipe at `path`; {} where it has none. ValueError where it is no plain table of texts."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if value is None or [t.id for t in targets if isinstance(t, ast.Name)] != ["INPUTS"]:
            continue
        try:
            inputs = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that its documentation names
            inputs = None
        if not isinstance(inputs, dict) or not all(isinstance(text, str) for pair in inputs.items() for text in pair):
            raise ValueError(
                f"INPUTS of the recipe {path}, in line {node.lineno}, must be a dict of plain texts, as "
                '{"field": "the command that makes it"}, since it is read before the recipe is run'
            )
        return inputs
    return {}


def _default(tree: ast.Module, field: str) -> str:
    """The text that a dataclass of the file has as its field's default; "none" where it has none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == field:
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
    return "none"
