"""Guidance: how much the condition counts, and by which guider the branches of one context are combined.

A family renders the branches, strongest condition first; each generator combines its own predictions: logits here with
`Guidance.combine`, predictions of a flow in `unigen.diffusion.sampling` with one of `unigen.samplers.guiders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from numbers import Real
from typing import TYPE_CHECKING

from unigen.samplers.guiders import GUIDERS, combine_chain
from unigen.utils.option_types import FloatRange
from unigen.utils.text import shorten

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE_SCALE = FloatRange(0, 100, "1 is off")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + s (c - u), off at s = 1 (Ho and Salimans 2022, eq. 6, written with s = 1 + w).

    With more branches p_1 .. p_n: p_n + sum_i s_i (p_i - p_(i+1)), InstructPix2Pix's and Chameleon's chain. Raises
    ValueError for a scale or an interval outside its range, or an unknown guider.
    """

    scales: tuple[float, ...] = (3.0,)
    """One for each branch but the last, from 0 to 100."""
    guider: str = "cfg"
    """Name of a guider (`unigen.samplers.guiders`); all but cfg are of a flow only."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times of a flow, from 0 (data) to 1 (noise), outside which guidance is off (Kynkaanniemi et al. 2024)."""
    kind: InitVar[object] = None
    """Former name of `guider`; refused with the new one."""

    def __post_init__(self, kind: object) -> None:
        if kind is not None:
            raise ValueError("the kind of Guidance is now called guider: write Guidance(scales, guider=...)")
        if not isinstance(self.guider, str) or self.guider not in GUIDERS:
            raise ValueError(f"unknown guider {shorten(self.guider)}: one of {', '.join(GUIDERS)}")
        if not isinstance(self.scales, (tuple, list)) or not self.scales:
            raise ValueError(f"scales of guidance must be a tuple of numbers, not {shorten(self.scales)}")
        if len(self.scales) != 1 and not GUIDERS[self.guider].combines_chains:
            raise ValueError(f"the guider {self.guider} combines two branches: give one scale")
        object.__setattr__(self, "scales", tuple(GUIDANCE_SCALE.check("guidance", scale) for scale in self.scales))
        interval = self.interval
        if not (
            isinstance(interval, (tuple, list))
            and len(interval) == 2
            and all(isinstance(t, Real) and 0 <= t <= 1 for t in interval)
        ):
            raise ValueError(f"interval of guidance must be two times in [0, 1], not {shorten(interval)}")
        object.__setattr__(self, "interval", tuple(interval))

    @classmethod
    def from_value(cls, value: float | Sequence[float] | Guidance) -> Guidance:
        """The guidance that a user's value means.

        Args:
            value: one scale, several, or a `Guidance`, which is returned as it is.

        Raises:
            ValueError: for a scale outside its range.
        """
        if isinstance(value, Guidance):
            return value
        return cls(tuple(value) if isinstance(value, (list, tuple)) else (value,))  # type: ignore[arg-type]

    @property
    def num_branches(self) -> int:
        """How many branches have to be computed: one where guidance is off."""
        return 1 if all(scale == 1 for scale in self.scales) else len(self.scales) + 1

    def combine(self, predictions: Sequence[Tensor], weight: float = 1.0) -> Tensor:
        """The guided logits of a generator of codes.

        Args:
            predictions: one tensor a branch, all of one shape, strongest condition first.
            weight: share of the guidance that counts, from 0 (scales of 1) to 1, for generators that raise it on the
                way.

        Returns:
            A tensor of the same shape.
        """
        assert len(predictions) == self.num_branches
        return combine_chain(predictions, self.scales, weight)

    def applies_at(self, t: float) -> bool:
        """Is guidance on at time t of a flow, from 0 (data) to 1 (noise)?"""
        return self.num_branches > 1 and self.interval[0] <= t <= self.interval[1]
