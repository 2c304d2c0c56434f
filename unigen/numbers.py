"""Numbers as people type them and forms send them, strictly: Python's `int` and `float` would also take 1_0, blanks
around, and the digits of other scripts."""

from __future__ import annotations

import re

INTEGER = re.compile(r"-?[0-9]{1,30}")
REAL = re.compile(r"-?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,4})?")


GROUPED = re.compile(r"(?<=[0-9])_(?=[0-9])")


def digits(text: str) -> str:
    """The same without the underscores by which Python groups digits: 1_000 is 1000."""
    return GROUPED.sub("", text)


def parse_int(text: str) -> int:
    """The whole number that a text spells. Raises ValueError."""
    if not INTEGER.fullmatch(text):
        raise ValueError(f"{text[:50]!r} is not a whole number")
    return int(text)


def parse_float(text: str) -> float:
    """The number that a text spells, infinite where it is too large. Raises ValueError."""
    if not REAL.fullmatch(text):
        raise ValueError(f"{text[:50]!r} is not a number")
    return float(text)
