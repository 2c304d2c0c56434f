"""Counts calls of a function and the time spent in it, by standing in its place.

    with CallCounter(engine.model, "cached_hidden_states") as step: ...        # step.calls, step.seconds

It does not depend on what it watches."""

from __future__ import annotations

import time


class CallCounter:
    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name
        self.function, self.calls, self.seconds = getattr(owner, name), 0, 0.0
        setattr(owner, name, self)

    def __enter__(self) -> CallCounter:
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self.owner, self.name)  # the owner's class has the function

    def __call__(self, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        return result
