"""Options of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from unigen.options import OptionGroup, option
from unigen.utils.option_types import Name

SPECULATIVE_METHODS = ("sjd", "jacobi")
"""See `unigen.generators.jacobi`."""


@dataclass(frozen=True)
class Acceleration(OptionGroup):
    """How next-token writes several codes a step."""

    accelerate: str | None = option(
        None,
        "of next-token, several codes a step: jacobi (same picture) or sjd",
        Name(lambda: SPECULATIVE_METHODS, "acceleration"),
    )
    "Method of speculative decoding; None writes one code a step."
