"""Options of masked prediction."""

from __future__ import annotations

from dataclasses import dataclass

from unigen.options import OptionGroup, option
from unigen.utils.option_types import IntRange


@dataclass(frozen=True)
class MaskedOptions(OptionGroup):
    """How the codes of a picture are unmasked."""

    steps: int = option(12, "number of sampling steps, where the generator can choose", IntRange(1, 1_000))
    "Passes; in each the surest codes are written."
