"""Old names of keyword arguments: a call with one is refused, and the error says the new name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def keyword_renames(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a function whose keyword arguments have changed name.

    Args:
        **new_names: new name of each keyword by its old one.

    Returns:
        The decorator. What it returns raises TypeError for an old name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old in kwargs:
                    raise TypeError(f"{function.__name__}(): the argument {old!r} is called {new!r} now")
            return function(*args, **kwargs)

        return call

    return decorate
