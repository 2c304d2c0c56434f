"""Guidance: one prediction from several branches of the same context. Pure functions.

A family renders the branches, strongest condition first; each generator combines its own predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + s (c - u), off at s = 1 (Ho and Salimans 2022, eq. 6, written with s = 1 + w).

    With more branches p_1 .. p_n: p_n + sum_i s_i (p_i - p_(i+1)), InstructPix2Pix's and Chameleon's chain.
    scales: one for each branch but the last. Raises ValueError for a scale that is negative or not finite.
    """

    scales: tuple[float, ...] = (3.0,)

    def __post_init__(self) -> None:
        for scale in self.scales:
            if not math.isfinite(scale) or scale < 0:
                raise ValueError(f"guidance must be a number of at least 0 (1 is off), not {scale}")

    @classmethod
    def of(cls, value: float | Sequence[float] | Guidance) -> Guidance:
        if isinstance(value, Guidance):
            return value
        return cls(tuple(value)) if isinstance(value, (list, tuple)) else cls((float(value),))  # type: ignore[arg-type]

    @property
    def branches(self) -> int:
        """How many branches have to be computed: one where guidance is off."""
        return 1 if all(scale == 1 for scale in self.scales) else len(self.scales) + 1

    def combine(self, predictions: Sequence[Tensor], strength: float = 1.0) -> Tensor:
        """predictions: one tensor a branch, all of one shape, strongest condition first. strength: the share of the
        guidance that counts, from 0 (scales of 1) to 1, for generators that raise it on the way."""
        assert len(predictions) == self.branches
        result = predictions[-1]
        if len(predictions) > 1:
            for scale, strong, weak in zip(self.scales, predictions, predictions[1:], strict=False):
                result = result + (1 + (scale - 1) * strength) * (strong - weak)
        return result
