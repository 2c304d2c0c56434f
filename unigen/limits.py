"""The ranges of the numbers that users may give: one table for Python, the command line and the server.

    check_limit("steps", 20)   # 20, or a ValueError in one line: "steps must be a whole number from 1 to 1,000, not 0"
    parse_limit("steps", "20") # the same of a text

Nothing heavy is imported here: `unigen --help` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from unigen.utils.numbers import parse_float, parse_int
from unigen.utils.text import shorten


@dataclass(frozen=True)
class Limit:
    """A range of numbers from `low` to `high`, both of them allowed, but for `low` where `above`. whole: are they whole
    numbers? note: what one of them means."""

    low: int
    high: int
    whole: bool = True
    above: bool = False
    note: str = ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        bounds = f"above {self.low} and at most {self.high:,}" if self.above else f"from {self.low} to {self.high:,}"
        return f"{kind} {bounds}" + (f" ({self.note})" if self.note else "")

    def contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        return bool(self.low < value <= self.high or (value == self.low and not self.above))  # type: ignore[operator]


LIMITS: Mapping[str, Limit] = {
    "seed": Limit(0, 2**64 - 1),
    "n": Limit(1, 1_000),
    "candidates": Limit(1, 64),
    "steps": Limit(1, 1_000),
    "guidance": Limit(0, 100, whole=False, note="1 is off"),
    "temperature": Limit(0, 100, whole=False, note="0 is greedy"),
    "top_k": Limit(0, 1_000_000, note="0 is off"),
    "top_p": Limit(0, 1, whole=False, above=True, note="1 is off"),
    "repetition_penalty": Limit(1, 10, whole=False, note="1 is off"),
    "max_tokens": Limit(1, 1_000_000),
    "max_images": Limit(1, 64),
    "previews": Limit(0, 64),
    "count": Limit(1, 100_000),
    "width": Limit(1, 8_192, note="pixels"),
    "height": Limit(1, 8_192, note="pixels"),
    "strength": Limit(0, 1, whole=False, above=True),
    "vary": Limit(0, 1, whole=False, above=True, note="1 is all of the picture"),
}
SERVER_LIMITS: Mapping[str, Limit] = {
    **LIMITS,
    "n": Limit(1, 16),
    "candidates": Limit(1, 8),
    "previews": Limit(0, 3),
}
"""Of one request to the server."""


def check_limit(name: str, value: Any, limits: Mapping[str, Limit] = LIMITS) -> Any:
    """The value as an int or a float. Raises ValueError in one line where it is no number of the range of `name`."""
    limit = limits[name]
    if not limit.contains(value):
        raise ValueError(f"{name} must be {limit}, not {shorten(value)}")
    return int(value) if limit.whole else float(value)


def parse_limit(name: str, text: str, limits: Mapping[str, Limit] = LIMITS) -> Any:
    """`check_limit` of a number that is written out. Raises ValueError, too, for a text that is no number."""
    value: Any = text
    try:
        value = parse_int(text.strip()) if limits[name].whole else parse_float(text.strip())
    except ValueError:
        pass
    return check_limit(name, value, limits)


def limit_argument(name: str, limits: Mapping[str, Limit] = LIMITS) -> Callable[[str], Any]:
    """`parse_limit` as the type of an argument of argparse."""

    def parse_argument(text: str) -> Any:
        try:
            return parse_limit(name, text, limits)
        except ValueError:
            from argparse import ArgumentTypeError

            raise ArgumentTypeError(f"{shorten(text)} is not {limits[name]}") from None

    return parse_argument


def number_argument(low: int, high: int, whole: bool = True, above: bool = False) -> Callable[[str], Any]:
    """The type of an argument of argparse that has a range of its own, as `Limit` takes it."""
    return limit_argument("", {"": Limit(low, high, whole, above)})


def pydantic_bounds(name: str, limits: Mapping[str, Limit] = SERVER_LIMITS) -> dict[str, Any]:
    """The range as arguments of a field of pydantic."""
    limit = limits[name]
    return {"gt" if limit.above else "ge": limit.low, "le": limit.high}
