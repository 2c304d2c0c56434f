"""Counts the calls of a function and the time spent in it: it replaces the function while a context is open.

    with CallCounter(engine.model, "cached_hidden_states") as step: ...        # step.calls, step.seconds

Does not depend on: what it counts.
"""

from __future__ import annotations

import time


class CallCounter:
    """Counts calls of an attribute's function while the context is open.

    Args:
        owner: object whose attribute is replaced on the instance.
        name: of the attribute; the owner's class defines the function.

    Attributes:
        calls: how many calls there were.
        seconds: time spent in them.
    """

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name
        self.function, self.calls, self.seconds = getattr(owner, name), 0, 0.0
        setattr(owner, name, self)

    def __enter__(self) -> CallCounter:
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self.owner, self.name)  # the owner's class has the function

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function, and add to the counts."""
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        return result
