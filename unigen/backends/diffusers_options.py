"""Options of diffusers pipelines."""

from __future__ import annotations

from dataclasses import dataclass

from unigen.options import OptionGroup, option
from unigen.utils.option_types import FloatRange, IntRange

STEPS = IntRange(1, 1_000)


@dataclass(frozen=True)
class PipelineOptions(OptionGroup):
    """How a pipeline draws, beside what others take too."""

    steps: int = option(20, "number of sampling steps, where the generator can choose", STEPS)
    "Evaluations of the network; the pipeline's own default where nothing is asked for."


@dataclass(frozen=True)
class EditOptions(OptionGroup):
    """How far a picture is changed."""

    outputs = frozenset({"edit", "inpaint"})

    strength: float = option(
        1.0, "of a diffusers pipeline: how much is changed; 1 is all", FloatRange(0, 1, above=True)
    )
    "Share of the noise that covers the picture before it is drawn anew."
