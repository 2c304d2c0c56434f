"""Options of how ids are drawn and of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unigen.options import WRITING, OptionGroup, option
from unigen.samplers.guidance import GUIDANCE_SCALE, Guidance
from unigen.utils.option_types import FloatRange, IntRange, OptionType

TEMPERATURE = FloatRange(0, 100, "0 is greedy")
TOP_K = IntRange(0, 1_000_000, "0 is off")
TOP_P = FloatRange(0, 1, "1 is off", above=True)
REPETITION_PENALTY = FloatRange(1, 10, "1 is off")
TEMPERATURE_HELP = "1 samples as trained, 0 takes the likeliest"
TOP_K_HELP = "sample among the k likeliest tokens; 0 is all"
TOP_P_HELP = "nucleus sampling: the smallest set of this probability"


@dataclass(frozen=True)
class GuidanceScales(OptionType):
    """A scale of guidance, or one for each branch but the last, or a whole `Guidance`."""

    def check(self, name: str, value: object) -> object:
        """The value as the engine takes it. Raises ValueError for what it cannot be."""
        return Guidance.from_value(value)  # type: ignore[arg-type]

    def parse(self, text: str) -> float:
        """The value that a text of the command line spells. Raises argparse.ArgumentTypeError."""
        return GUIDANCE_SCALE.parse(text)

    def json_type(self) -> tuple[object, dict[str, object]]:
        """The annotation and the constraints of a field of JSON."""
        return float | list[float], {}

    def to_json(self, value: object) -> object:
        """The value as JSON holds it."""
        scales = Guidance.from_value(value).scales  # type: ignore[arg-type]
        return scales[0] if len(scales) == 1 else list(scales)


@dataclass(frozen=True)
class GuidanceOptions(OptionGroup):
    """Classifier-free guidance of pictures."""

    guidance: float | Sequence[float] | Guidance = option(
        3.0, "how strongly pictures follow the words; 1 is off", GuidanceScales()
    )
    "Scale, from 0 to 100."


@dataclass(frozen=True)
class CodeSampling(OptionGroup):
    """How the codes of images are sampled."""

    temperature: float = option(0.8, TEMPERATURE_HELP, TEMPERATURE)
    "By which logits are divided; 0 is greedy."
    top_k: int = option(0, TOP_K_HELP, TOP_K, off=0)
    "Number of likeliest codes to sample from; 0 is all."
    top_p: float = option(1.0, TOP_P_HELP, TOP_P, off=1)
    "Probability that these codes have together at least; 1 is off."


@dataclass(frozen=True)
class TextSampling(OptionGroup):
    """How text is sampled."""

    outputs = WRITING

    temperature: float = option(0.0, TEMPERATURE_HELP, TEMPERATURE)
    "By which logits are divided; 0 is greedy."
    top_k: int = option(0, TOP_K_HELP, TOP_K, off=0)
    "Number of likeliest ids to sample from; 0 is all."
    top_p: float = option(1.0, TOP_P_HELP, TOP_P, off=1)
    "Probability that these ids have together at least; 1 is off."
    repetition_penalty: float = option(
        1.0, "makes tokens that already occur less likely; 1 is off", REPETITION_PENALTY, http=""
    )
    "By which positive logits of ids that stand there already are divided; 1 is off."
