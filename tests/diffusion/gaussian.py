"""Data ~ N(MEAN, STD^2) and noise ~ N(0, 1), of which everything is known in closed form, in float64.

x_t ~ N(alpha MEAN, var) with var = alpha^2 STD^2 + sigma^2, and
E[data | x_t] = MEAN + alpha STD^2 (x_t - alpha MEAN) / var.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unigen.diffusion.path import LinearPath, Path, PredictionType, VariancePreservingPath

MEAN, STD = 0.7, 0.4
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
PATHS: dict[str, Path] = {
    "linear": LinearPath(),
    "variance preserving": VariancePreservingPath((1 - BETAS).cumprod(0)),
}


def expectation(path: Path, x_t: Tensor, t: float, kind: PredictionType) -> Tensor:
    """What a network that has learnt everything predicts at x_t and t."""
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (path.alpha, path.sigma))
    var = alpha**2 * STD**2 + sigma**2
    data = MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / var
    noise = sigma * (x_t - alpha * MEAN) / var
    if kind == "velocity":
        return noise - data if isinstance(path, LinearPath) else alpha * noise - sigma * data
    return {"data": data, "noise": noise, "score": -(x_t - alpha * MEAN) / var}[kind]


def velocity(x: Tensor, t: float) -> Tensor:
    """Of the linear path: the derivative of x(t) = (1 - t) MEAN + sqrt((1 - t)^2 STD^2 + t^2) z."""
    spread = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
    z = (x - (1 - t) * MEAN) / spread
    return -MEAN + (t - (1 - t) * STD**2) / spread * z
