"""Guidance: one prediction from several branches of the same context. Pure functions.

A family renders the branches, strongest condition first; each generator combines its own predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from unigen.limits import check_limit
from unigen.utils.text import shorten

GUIDANCE_KINDS = ("cfg", "rescale", "apg", "cfg-zero")
"""How branches of a flow are combined: see `guided_velocity`."""
RESCALE_FACTOR = 0.7  # the share of the rescaled prediction (Lin et al. 2024)
APG_MOMENTUM = -0.5  # of APG's running difference (Sadat et al. 2024)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + s (c - u), off at s = 1 (Ho and Salimans 2022, eq. 6, written with s = 1 + w).

    With more branches p_1 .. p_n: p_n + sum_i s_i (p_i - p_(i+1)), InstructPix2Pix's and Chameleon's chain.
    scales: one for each branch but the last. kind, interval: of a flow only; outside the interval of times guidance is
    off (Kynkaanniemi et al. 2024). Raises ValueError for a scale or an interval outside its range, or an unknown kind.
    """

    scales: tuple[float, ...] = (3.0,)
    kind: str = "cfg"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in GUIDANCE_KINDS:
            raise ValueError(f"unknown kind of guidance {shorten(self.kind)}: one of {', '.join(GUIDANCE_KINDS)}")
        if not isinstance(self.scales, (tuple, list)) or not self.scales:
            raise ValueError(f"scales of guidance must be a tuple of numbers, not {shorten(self.scales)}")
        if self.kind != "cfg" and len(self.scales) != 1:
            raise ValueError(f"guidance of kind {self.kind} has two branches: give one scale")
        object.__setattr__(self, "scales", tuple(check_limit("guidance", scale) for scale in self.scales))
        interval = self.interval
        if not (
            isinstance(interval, (tuple, list))
            and len(interval) == 2
            and all(isinstance(t, Real) and 0 <= t <= 1 for t in interval)
        ):
            raise ValueError(f"interval of guidance must be two times in [0, 1], not {shorten(interval)}")
        object.__setattr__(self, "interval", tuple(interval))

    @classmethod
    def of(cls, value: float | Sequence[float] | Guidance) -> Guidance:
        if isinstance(value, Guidance):
            return value
        return cls(tuple(value) if isinstance(value, (list, tuple)) else (value,))  # type: ignore[arg-type]

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


def guided_velocity(guidance: Guidance, parts: Sequence[Tensor], x: Tensor, t: float, memory: dict[str, Any]) -> Tensor:
    """One velocity (B, ...) of a flow from those of its branches, at x and time t (1 noise, 0 data).

    cfg       u + s (c - u)
    rescale   cfg, its standard deviation drawn towards that of c                  (Lin et al. 2024, eq. 15 and 16)
    apg       of the clean prediction x - t v: what is parallel to c is left out of c - u, with negative momentum
              (Sadat et al. 2024, arXiv 2410.02416, algorithm 1 with eta 0 and no threshold on the norm)
    cfg-zero  u scaled by its best fit to c, and no velocity at the first evaluation    (Fan et al. 2025, CFG-Zero*)
    All but cfg are diffusers' own. memory: empty at the start of a trajectory, and the same in all of its steps.
    """
    is_first_step = not memory
    memory.setdefault("begun", True)
    if len(parts) == 1 or not guidance.interval[0] <= t <= guidance.interval[1]:
        return parts[0]
    if guidance.kind == "cfg":
        return guidance.combine(parts)
    c, u = parts
    if guidance.kind == "rescale":
        from diffusers.guiders.guider_utils import rescale_noise_cfg

        return rescale_noise_cfg(guidance.combine(parts), c, RESCALE_FACTOR)
    if guidance.kind == "cfg-zero":
        from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

        if is_first_step:
            return torch.zeros_like(c)
        u = u * cfg_zero_star_scale(c.flatten(1), u.flatten(1)).reshape(-1, *[1] * (c.ndim - 1))
        return guidance.combine((c, u))
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    momentum = memory.setdefault("momentum", MomentumBuffer(APG_MOMENTUM))
    clean = normalized_guidance(
        x - t * c, x - t * u, guidance.scales[0] - 1, momentum, eta=0.0, use_original_formulation=True
    )
    return (x - clean) / t
