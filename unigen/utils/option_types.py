"""What the value of an option may be, in Python, on the command line and in JSON.

    IntRange(1, 250).check("steps", 0)     # ValueError: steps must be a whole number from 1 to 250, not 0
    IntRange(1, 250).parse("20")           # 20

Standard library only. Bad values are a ValueError in one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from unigen.utils.argparser import non_empty
from unigen.utils.numbers import parse_float, parse_int
from unigen.utils.text import check_text, shorten

MAX_NAME_LENGTH = 64
"""Characters of the name of a generator, a solver or the like."""
MAX_TEXT_LENGTH = 100_000
"""Characters of one text."""


class OptionType:
    """What the value of an option may be, in Python, on the command line and in JSON."""

    def check(self, name: str, value: object) -> object:
        """The value as the engine takes it. Raises ValueError in one line for what it cannot be."""
        return value

    def parse(self, text: str) -> object:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        return non_empty(text)

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation of a field of JSON, and its constraints as pydantic names them."""
        return str, {"max_length": MAX_NAME_LENGTH}

    def from_json(self, value: object) -> object:
        """The value as `check` takes it, of one that JSON holds; None where it asks for nothing."""
        return value

    def to_json(self, value: object) -> object:
        """A value that `check` has given, as JSON holds it."""
        return value


@dataclass(frozen=True)
class IntRange(OptionType):
    """A whole number."""

    low: int
    high: int
    note: str = ""
    "What one of the numbers means."

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high:,}" + (f" ({self.note})" if self.note else "")

    def contains(self, value: object) -> bool:
        """Whether a value is a number of this range."""
        return isinstance(value, Integral) and not isinstance(value, bool) and self.low <= int(value) <= self.high

    def check(self, name: str, value: object) -> int:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        if not self.contains(value):
            raise ValueError(f"{name} must be {self}, not {shorten(value)}")
        return int(value)  # type: ignore[call-overload, no-any-return]

    def parse(self, text: str) -> int:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        try:
            return self.check("", parse_int(text.strip()))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not {self}") from None

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation and the constraints of a field of JSON."""
        return int, {"ge": self.low, "le": self.high}


@dataclass(frozen=True)
class FloatRange(OptionType):
    """A finite number."""

    low: float
    high: float
    note: str = ""
    "What one of the numbers means."
    above: bool = False
    "Is `low` itself outside?"

    def __str__(self) -> str:
        bounds = f"above {self.low} and at most" if self.above else f"from {self.low} to"
        return f"a number {bounds} {self.high:,}" + (f" ({self.note})" if self.note else "")

    def contains(self, value: object) -> bool:
        """Whether a value is a number of this range."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return bool(self.low < value <= self.high or (value == self.low and not self.above))  # type: ignore[operator]

    def check(self, name: str, value: object) -> float:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        if not self.contains(value):
            raise ValueError(f"{name} must be {self}, not {shorten(value)}")
        return float(value)  # type: ignore[arg-type]

    def parse(self, text: str) -> float:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        try:
            return self.check("", parse_float(text.strip()))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not {self}") from None

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation and the constraints of a field of JSON."""
        return float, {"gt" if self.above else "ge": self.low, "le": self.high}


@dataclass(frozen=True)
class Name(OptionType):
    """A name, of those that `choices` lists where it is given. They are looked up at each use."""

    choices: Callable[[], Iterable[str]] | None = None
    title: str = ""
    "How errors call it, where not by the option's name."

    def check(self, name: str, value: object) -> str:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME_LENGTH:
            raise ValueError(f"{name} must be a name, not {shorten(value)}: leave it out for the usual one")
        if self.choices is not None and value not in (names := list(self.choices())):
            raise ValueError(f"unknown {self.title or name} {value!r}: one of {', '.join(names)}")
        return value


@dataclass(frozen=True)
class Text(OptionType):
    """A text; an empty one asks for nothing."""

    def check(self, name: str, value: object) -> str:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        return check_text(name, value)

    def parse(self, text: str) -> str:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        return text

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation and the constraints of a field of JSON."""
        return str, {"max_length": MAX_TEXT_LENGTH}

    def from_json(self, value: object) -> object:
        """The value of one that JSON holds; None where it asks for nothing."""
        return value or None


@dataclass(frozen=True)
class Size(OptionType):
    """Width and height in pixels."""

    side: IntRange = IntRange(1, 8_192, "pixels")

    def check(self, name: str, value: object) -> tuple[int, int]:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(self.side.contains, value))):
            raise ValueError(
                f"a size is two whole numbers, width and height in pixels, at most {self.side.high:,} each, "
                f"not {shorten(value)}"
            )
        return int(value[0]), int(value[1])

    def parse(self, text: str) -> tuple[int, int]:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        width, _, height = text.partition("x")
        try:
            return self.side.parse(width), self.side.parse(height)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{shorten(text)} is not a size like 512x768: width and height in pixels, {self.side.high:,} at most"
            ) from None

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation and the constraints of a field of JSON."""
        return str, {"pattern": r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$"}

    def from_json(self, value: object) -> object:
        """The value of one that JSON holds; None where it asks for nothing."""
        if value == "auto":
            return None
        width, _, height = str(value).partition("x")
        return int(width), int(height)


SEED = IntRange(0, 2**64 - 1)
COUNT = IntRange(1, 1_000)
"""Answers that are made at a time."""
MAX_IMAGES = IntRange(1, 64)
"""Pictures of one answer in text and pictures."""


def number_argument(low: float, high: float, is_integer: bool = True, above: bool = False) -> Callable[[str], float]:
    """The type of an argument of argparse that has a range of its own.

    Args:
        low: the first of the range.
        high: the last.
        is_integer: are they whole numbers?
        above: is `low` itself outside?

    Returns:
        What parses the argument.
    """
    return IntRange(int(low), int(high)).parse if is_integer else FloatRange(low, high, above=above).parse
