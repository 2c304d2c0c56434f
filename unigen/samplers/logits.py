"""From logits to ids: temperature, top-k, top-p, and one draw a row. Pure functions.

Order, the same for every model: guidance on raw logits, then the legality of ids, temperature, top-k, top-p, draw.
Shapes: B rows, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def whole(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int. Raises ValueError for what is no whole number, or less than the least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, not {value!r}")
    return int(value)


def finite(value: Any) -> bool:
    """Is it a number, neither infinite nor nan?"""
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off; the last is of text alone. Raises
    ValueError outside these ranges."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number of at least 0 (0 is greedy), not {self.temperature!r}")
        whole("top_k", self.top_k, 0)
        if not (finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1] (1 is off), not {self.top_p!r}")
        if not (finite(self.repetition_penalty) and 1 <= self.repetition_penalty <= 10):
            raise ValueError(f"repetition_penalty lies between 1 (off) and 10, not {self.repetition_penalty!r}")


def penalize(logits_V: Tensor, ids: set[int], penalty: float) -> None:
    """Make ids that stand in the text already less likely, in place: a positive logit is divided by the penalty, a
    negative one multiplied (Keskar et al. 2019, as transformers does)."""
    at = torch.tensor(sorted(id for id in ids if id < len(logits_V)), dtype=torch.int64, device=logits_V.device)
    logits_V[at] = torch.where(logits_V[at] > 0, logits_V[at] / penalty, logits_V[at] * penalty)


def warp(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Log-weights after temperature, top-k and top-p; what is cut is -inf. Needs temperature > 0."""
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.kthvalue(logits_BV.shape[-1] - sampling.top_k + 1, dim=-1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        cut_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(cut_BV.scatter(-1, order_BV, cut_BV), -math.inf)
    return logits_BV


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What ids are drawn from (B, V): after temperature, top-k and top-p; a point where temperature is 0."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_BV.argmax(dim=-1), logits_BV.shape[-1]).float()
    return warp(logits_BV, sampling).softmax(dim=-1)


def draw(logits_BV: Tensor, sampling: Sampling, rngs: list[torch.Generator]) -> Tensor:
    """One id a row, int64 (B,). Row b draws only from its own `rngs[b]`, so a row does not depend on its batch."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    race_BV = torch.stack([torch.empty(logits_BV.shape[-1]).exponential_(generator=rng) for rng in rngs])
    return race(warp(logits_BV, sampling).softmax(dim=-1), race_BV)


def draw_together(logits_NV: Tensor, sampling: Sampling, rng: torch.Generator) -> Tensor:
    """One id a row, int64 (N,), all of them from one source of randomness."""
    if sampling.temperature == 0:
        return logits_NV.argmax(dim=-1)
    return race(warp(logits_NV, sampling).softmax(dim=-1), torch.empty(logits_NV.shape).exponential_(generator=rng))


def race(weights_BV: Tensor, race_BV: Tensor) -> Tensor:
    """The exponential race: argmax_v p_v / E_v with E_v ~ Exp(1) is a sample of p. int64 (B,)."""
    return (weights_BV / race_BV.to(weights_BV.device)).argmax(dim=-1)
