"""Training: `run_recipe` loads a recipe file and trains it; `Trainer(cfg, spec).run()` is what it calls.

Nothing heavy is imported until a name is used. Does not depend on: losses (an Objective does), models (a recipe does).

    unigen train recipes/tiny.py steps=100 optim.lr=1e-4
"""

import importlib
from typing import TYPE_CHECKING

from unigen.config import OptimConfig, RunConfig

if TYPE_CHECKING:
    from unigen.training.recipe import run_recipe
    from unigen.training.train_spec import Objective, TrainSpec
    from unigen.training.trainer import Trainer

__all__ = ["Objective", "OptimConfig", "RunConfig", "TrainSpec", "Trainer", "run_recipe"]


def __getattr__(name: str) -> object:
    if name in __all__:
        home = {"run_recipe": "recipe", "Trainer": "trainer"}.get(name, "train_spec")
        return getattr(importlib.import_module(f"unigen.training.{home}"), name)
    if name == "Job":
        raise ImportError("unigen.training.Job is called TrainSpec now")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
