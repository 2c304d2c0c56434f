"""Options of flows from noise to data."""

from __future__ import annotations

from dataclasses import dataclass

from unigen.diffusion.solvers import MAX_STEPS, SOLVERS
from unigen.options import OptionGroup, option
from unigen.samplers.guiders import GUIDERS
from unigen.utils.option_types import IntRange, Name


@dataclass(frozen=True)
class FlowOptions(OptionGroup):
    """How a flow is followed from noise to data."""

    steps: int = option(20, "number of sampling steps, where the generator can choose", IntRange(1, MAX_STEPS))
    "Steps of the solver."
    solver: str = option("euler", "of a flow: {choices}", Name(lambda: SOLVERS))
    "Name of the solver (`unigen.diffusion.solvers`)."
    guider: str = option("cfg", "of a flow: {choices}", Name(lambda: GUIDERS))
    "How the branches of guidance are combined (`unigen.samplers.guiders`)."

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.guider, self.steps) and self.steps < (min_steps := GUIDERS[self.guider].min_steps):
            raise ValueError(f"{self.guider} needs at least {min_steps} steps, not {self.steps}")
