"""Generators, one file each, found by name: next-scale is next_scale.py. There is no registry.

The file of an image generator ends with `GENERATOR = ItsClass`. The class method `from_context(context)` builds an
untrained generator and raises ValueError where its tokenizer or settings do not fit. Does not depend on: how the
generators work.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any


def generator_names() -> list[str]:
    """The names of all image generators, sorted, such as "next-token"."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if hasattr(_module(name), "GENERATOR"))


def find_generator(name: str) -> Any:
    """The class of a generator.

    Args:
        name: of the generator, such as "next-token".

    Returns:
        Its class, a `unigen.generators.base.Generator` with the class method `from_context`.

    Raises:
        ValueError: there is no such generator; the error lists those there are.
    """
    file = name.replace("-", "_")
    exists = file.isidentifier() and importlib.util.find_spec(f"{__name__}.{file}") is not None
    generator = getattr(_module(file), "GENERATOR", None) if exists else None
    if generator is None or generator.name != name:
        raise ValueError(f"unknown generator {name!r}: one of {', '.join(generator_names())}")
    return generator


def _module(file: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{file}")
