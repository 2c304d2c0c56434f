"""From logits to ids: temperature, top-k, top-p, and one draw a row. Pure functions.

Order, the same for every model: guidance on raw logits, then the legality of ids, temperature, top-k, top-p, draw.
Shapes: B rows, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unigen.samplers.options import TextSampling

MIN_TEMPERATURE = 1e-5
"""Temperatures below this one draw the likeliest id: logits divided by them are beyond float32."""


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off; the last is of text alone. Raises
    ValueError outside the ranges of `unigen.samplers.options`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, declared in TextSampling.options().items():
            object.__setattr__(self, name, declared.type.check(name, getattr(self, name)))
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)


def apply_repetition_penalty(logits_V: Tensor, ids: set[int], penalty: float) -> None:
    """Make ids that stand in the text already less likely, in place: a positive logit is divided by the penalty, a
    negative one multiplied (Keskar et al. 2019, as transformers does)."""
    at = torch.tensor(sorted(id for id in ids if id < len(logits_V)), dtype=torch.int64, device=logits_V.device)
    logits_V[at] = torch.where(logits_V[at] > 0, logits_V[at] / penalty, logits_V[at] * penalty)


def warp(logits_BV: Tensor, sampling: SamplingOptions) -> Tensor:
    """Log-weights after temperature, top-k and top-p; what is cut is -inf. Needs temperature > 0."""
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.kthvalue(logits_BV.shape[-1] - sampling.top_k + 1, dim=-1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -math.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        removed_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= sampling.top_p
        removed_BV[..., 0] = False  # a top_p that float32 holds as 0 keeps the likeliest
        logits_BV = logits_BV.masked_fill(removed_BV.scatter(-1, order_BV, removed_BV), -math.inf)
    return logits_BV


def probabilities(logits_BV: Tensor, sampling: SamplingOptions) -> Tensor:
    """What ids are drawn from (B, V): after temperature, top-k and top-p; a point where temperature is 0. A row of
    logits that are not finite is nan."""
    if sampling.temperature == 0:
        ids_B = argmax_ids(logits_BV)
        point_BV = torch.nn.functional.one_hot(ids_B.clamp(min=0), logits_BV.shape[-1]).float()
        return torch.where(ids_B[..., None] < 0, math.nan, point_BV)
    return warp(logits_BV, sampling).softmax(dim=-1)


def sample(logits_BV: Tensor, sampling: SamplingOptions, rngs: list[torch.Generator]) -> Tensor:
    """One id a row, int64 (B,), -1 where the row's logits are not finite. Row b draws only from its own `rngs[b]`, so a
    row does not depend on its batch."""
    if sampling.temperature == 0:
        return argmax_ids(logits_BV)
    race_BV = torch.empty(logits_BV.shape)
    for race_V, rng in zip(race_BV, rngs, strict=True):
        race_V.exponential_(generator=rng)
    return exponential_race_sample(warp(logits_BV, sampling).softmax(dim=-1), race_BV)


def sample_shared_rng(logits_NV: Tensor, sampling: SamplingOptions, rng: torch.Generator) -> Tensor:
    """One id a row, int64 (N,), -1 where the row's logits are not finite; all of them from one source of randomness."""
    if sampling.temperature == 0:
        return argmax_ids(logits_NV)
    return exponential_race_sample(
        warp(logits_NV, sampling).softmax(dim=-1), torch.empty(logits_NV.shape).exponential_(generator=rng)
    )


def log_probabilities(logits_BV: Tensor, sampling: SamplingOptions, ids_B: Tensor) -> Tensor:
    """Log-probabilities (B,) of ids under the distribution that they are drawn from.

    Args:
        logits_BV: guided logits (B, V), -inf for ids that are not allowed.
        sampling: temperature, top-k and top-p. At temperature 0, where nothing is drawn, those of temperature 1.
        ids_B: drawn ids (B,).

    Returns:
        Nats, float32, on the CPU.
    """
    if sampling.temperature > 0:
        logits_BV = warp(logits_BV, sampling)
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    return logprobs_BV.gather(-1, ids_B.to(logits_BV.device)[:, None])[:, 0].cpu()


def exponential_race_sample(weights_BV: Tensor, race_BV: Tensor) -> Tensor:
    """The exponential race: argmax_v p_v / E_v with E_v ~ Exp(1) is a sample of p. int64 (B,), -1 where p is not
    finite."""
    return _mask_non_finite(weights_BV, (weights_BV / race_BV.to(weights_BV.device)).argmax(dim=-1))


def argmax_ids(logits_BV: Tensor) -> Tensor:
    """The id of the greatest logit of each row, int64 (B,), -1 where that is not finite."""
    return _mask_non_finite(logits_BV, logits_BV.argmax(dim=-1))


def _mask_non_finite(values_BV: Tensor, ids_B: Tensor) -> Tensor:
    """The ids, -1 where the value at the id is not finite: the greatest of a row is nan where any of it is, and so are
    all of its weights after a softmax. It costs no look at the whole row, and a GPU is not waited for."""
    selected_B = values_BV.gather(-1, ids_B[..., None])[..., 0]
    return torch.where(selected_B.isfinite(), ids_B, -1)
