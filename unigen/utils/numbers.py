"""Numbers as people type them and forms send them, strictly: Python's `int` and `float` would also take 1_0, blanks
around, and the digits of other scripts. And the error for a model's numbers that are not finite."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INTEGER = re.compile(r"-?[0-9]{1,30}")
REAL = re.compile(r"-?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,4})?")


DIGIT_GROUP = re.compile(r"(?<=[0-9])_(?=[0-9])")


def strip_digit_groups(text: str) -> str:
    """The same without the underscores by which Python groups digits: 1_000 is 1000."""
    return DIGIT_GROUP.sub("", text)


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


class NonFiniteError(ValueError):
    """A model's numbers are infinite or nan."""

    def __init__(self, description: str, dtype: torch.dtype) -> None:
        dtype_name = str(dtype).removeprefix("torch.")
        others = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype_name)
        advice = f"load it with dtype {others}" if others else "its checkpoint may be damaged"
        super().__init__(f"{description} of this model are not finite in {dtype_name}: {advice}")
