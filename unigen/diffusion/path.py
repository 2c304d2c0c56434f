"""Paths between data and noise: x_t = alpha_t data + sigma_t noise, and what a network may predict of x_t.

    path = LinearPath(shift=3.0)
    t_M = path.sample_times((M,), rng)
    x_t = path.add_noise(data, noise, t_M)
    data = path.convert(prediction, x_t, t_M, "velocity", "data")

t runs from 0 (data) to 1 (noise). Does not depend on: solvers, guidance, networks.

Every kind of prediction is a linear map of data and noise, p = a data + b noise, with coefficients of the path and t:

    data       a = 1,  b = 0
    noise      a = 0,  b = 1
    score      a = 0,  b = -1 / sigma_t            the gradient of log p_t at x_t
    velocity   the path's own a, b

so that data and noise follow from x_t and one prediction by a linear system of two equations. It has no solution where
x_t and p are parallel: noise of predicted data at t = 0, data of predicted noise or score at t = 1.

Shapes: M samples; x_t, data, noise and predictions are (M, ...) of one shape; t is (M,) or has more of their leading
dimensions, or is one number for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PredictionType = Literal["velocity", "data", "noise", "score"]
"""What a network predicts of x_t."""


class PathSample(NamedTuple):
    """Points on paths from noise to data, and what a network has to learn there."""

    x_t: Tensor
    """Noised data (M, ...)."""
    t: Tensor
    """Times (M,) in [0, 1]."""
    target: Tensor
    """What the network has to predict (M, ...)."""


class Path(ABC):
    """How data becomes noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data in x_t, of t's shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise in x_t, of t's shape."""

    @abstractmethod
    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Those of data and noise in the velocity, each of t's shape."""

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t = alpha_t data + sigma_t noise.

        Args:
            data: (M, ...).
            noise: (M, ...).
            t: (M,), or one number.

        Returns:
            x_t (M, ...).
        """
        t = times_like(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def target(
        self, data: Tensor, noise: Tensor, t: Tensor | float, prediction_type: PredictionType = "velocity"
    ) -> Tensor:
        """What a network has to predict of x_t.

        Args:
            data: (M, ...).
            noise: (M, ...).
            t: (M,), or one number.
            prediction_type: what the network predicts.

        Returns:
            (M, ...).
        """
        a, b = self._coefficients(prediction_type, times_like(t, data))
        return a * data + b * noise

    def convert(
        self, prediction: Tensor, x_t: Tensor, t: Tensor | float, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """One kind of prediction as another.

        Args:
            prediction: (M, ...), of the kind `source`.
            x_t: (M, ...), where it was made.
            t: (M,), or one number.
            source: kind of the prediction.
            target: kind that is wanted.

        Returns:
            (M, ...); `prediction` itself where source and target are the same; not finite where the one does not
            determine the other (see the head of this file).
        """
        if source == target:
            return prediction
        t = times_like(t, x_t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, b = self._coefficients(source, t)
        determinant = alpha * b - sigma * a
        data = (b * x_t - sigma * prediction) / determinant
        if target == "data":
            return data
        noise = (alpha * prediction - a * x_t) / determinant
        if target == "noise":
            return noise
        if target == "score":
            return -noise / sigma
        a, b = self.velocity_coefficients(t)
        return a * data + b * noise

    def _coefficients(self, prediction_type: PredictionType, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, b of p = a data + b noise, each of t's shape."""
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if prediction_type == "velocity":
            return self.velocity_coefficients(t)
        if prediction_type == "data":
            return one, zero
        return zero, (one if prediction_type == "noise" else -1 / self.sigma(t))


@dataclass(frozen=True)
class LinearPath(Path):
    """Rectified flow (Liu et al. 2022; Esser et al. 2024, SD3, eq. 13):

    x_t = (1 - t) data + t noise,    velocity = dx_t / dt = noise - data
    """

    shift: float = 1.0
    """Resolution shift of the times towards noise (SD3, eq. 23): t' = shift t / (1 + (shift - 1) t); 1 is none."""

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path.alpha`."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path.sigma`."""
        return t

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path.velocity_coefficients`."""
        return -torch.ones_like(t), torch.ones_like(t)

    def sample_times(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        """Times in (0, 1) for training: the sigmoid of a normal variable (SD3, eq. 19), shifted.

        Args:
            shape: of the result.
            rng: randomness.

        Returns:
            float32, of this shape.
        """
        t = torch.sigmoid(torch.randn(tuple(shape), generator=rng))
        return self.shift * t / (1 + (self.shift - 1) * t)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """See `Path.add_noise`."""
        return torch.lerp(data, noise, times_like(t, data))

    def target(
        self, data: Tensor, noise: Tensor, t: Tensor | float, prediction_type: PredictionType = "velocity"
    ) -> Tensor:
        """See `Path.target`."""
        return noise - data if prediction_type == "velocity" else super().target(data, noise, t, prediction_type)

    def convert(
        self, prediction: Tensor, x_t: Tensor, t: Tensor | float, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """As `Path.convert`; between velocity and data by data = x_t - t velocity, which no division rounds."""
        if {source, target} != {"velocity", "data"}:
            return super().convert(prediction, x_t, t, source, target)
        t = t if isinstance(t, float) else times_like(t, x_t)
        return x_t - t * prediction if target == "data" else (x_t - prediction) / t


class VariancePreservingPath(Path):
    """The path of DDPM (Ho et al. 2020, eq. 4) on a table of a scheduler of diffusers:

    x_t = sqrt(a_t) data + sqrt(1 - a_t) noise,    velocity = sqrt(a_t) noise - sqrt(1 - a_t) data

    The velocity is that of Salimans and Ho 2022 (arXiv 2202.00512, appendix D), diffusers' "v_prediction". t is the
    timestep over the length of the table; between timesteps log a_t is linear. At t = 0 a little noise is left.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """
        Args:
            alphas_cumprod: a_t (T,) of the timesteps 0 .. T - 1, falling, in (0, 1).
        """
        self.log_alphas_cumprod = alphas_cumprod.double().log()

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path.alpha`."""
        return (self._log_alpha_cumprod(t) / 2).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path.sigma`."""
        return (-self._log_alpha_cumprod(t).expm1()).sqrt().to(t.dtype)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path.velocity_coefficients`."""
        return -self.sigma(t), self.alpha(t)

    def _log_alpha_cumprod(self, t: Tensor) -> Tensor:
        """log a_t in float64, of t's shape."""
        table = self.log_alphas_cumprod.to(t.device)
        timesteps = (t.double() * len(table)).clamp(0, len(table) - 1)
        below = timesteps.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], timesteps - below)


def times_like(t: Tensor | float, x: Tensor) -> Tensor:
    """t in x's dtype, with dimensions of length 1 behind it, as many as x has more, so that they multiply."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t[(...,) + (None,) * (x.ndim - t.ndim)]
