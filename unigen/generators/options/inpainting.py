"""Options of generators that can keep a part of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigen.options import OptionGroup, option
from unigen.utils.option_types import OptionType

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inpainting(OptionGroup):
    """What of a picture stays. Commands and servers make it of a picture and a mask (`unigen.inference.inpainting`)."""

    fixed_codes: Tensor | None = option(
        None, "codes that stay, -1 where to write", OptionType(), cli="", http="", reported=False
    )
    "Codes (h, w) of the model's image tokenizer, -1 where the generator samples."
