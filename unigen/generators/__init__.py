"""Ways of writing a segment, one file each, found by name: next-scale is next_scale.py. There is no registry.

A file of a way of writing pictures says `GENERATOR = itsClass`, whose `from_context(context)` makes an untrained one
and raises ValueError where its tokenizer or settings do not fit. Does not depend on what the generators do.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any


def generator_names() -> list[str]:
    """All ways of writing a picture, as users write them."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if hasattr(_module(name), "GENERATOR"))


def find_generator(name: str) -> Any:
    """The class of the generator of this name. Raises ValueError naming those there are."""
    file = name.replace("-", "_")
    exists = file.isidentifier() and importlib.util.find_spec(f"{__name__}.{file}") is not None
    generator = getattr(_module(file), "GENERATOR", None) if exists else None
    if generator is None or generator.name != name:
        raise ValueError(f"unknown generator {name!r}: one of {', '.join(generator_names())}")
    return generator


def _module(file: str) -> Any:
    return importlib.import_module(f"{__name__}.{file}")
