"""Paths and their predictions on a Gaussian, of which all are known."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from tests.diffusion.gaussian import BETAS, PATHS, expectation, velocity
from unigen.diffusion.path import LinearPath, PredictionType, VariancePreservingPath

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)
X = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(3, 1, 2, 2)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_each_prediction_gives_each_other(name: str, source: PredictionType, target: PredictionType) -> None:
    path = PATHS[name]
    for t in (0.05, 0.3, 0.5, 0.9):
        found = path.convert(expectation(path, X, t, source), X, t, source, target)
        torch.testing.assert_close(found, expectation(path, X, t, target))
        if source != target:  # the control: the same conversion of another time
            other = path.convert(expectation(path, X, t, source), X, t + 0.05, source, target)
            assert (other - expectation(path, X, t, target)).abs().max() > 1e-4


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_training_is_the_prediction_of_that_sample(name: str, kind: PredictionType) -> None:
    """Times of each sample, through `add_noise`, `target` and back."""
    path, t_M = PATHS[name], torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    data, noise = torch.randn(2, *X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, target = path.add_noise(data, noise, t_M), path.target(data, noise, t_M, kind)
    torch.testing.assert_close(path.convert(target, x_t, t_M, kind, "data"), data)
    torch.testing.assert_close(path.convert(target, x_t, t_M, kind, "noise"), noise)
    one = path.add_noise(data[1:2], noise[1:2], 0.5)
    torch.testing.assert_close(one, x_t[1:2])


def test_the_velocity_of_the_linear_path_is_its_derivative() -> None:
    path = LinearPath()
    for t in (0.1, 0.6):
        torch.testing.assert_close(expectation(path, X, t, "velocity"), velocity(X, t))
    data, noise = torch.randn(2, *X.shape, dtype=torch.float64)
    torch.testing.assert_close(
        (path.add_noise(data, noise, 0.500001) - path.add_noise(data, noise, 0.5)) / 1e-6,
        path.target(data, noise, 0.5),
        atol=1e-6,
        rtol=1e-6,
    )


def test_times_of_training_are_shifted_towards_noise() -> None:
    draws = [LinearPath(shift).sample_times((4096,), torch.Generator().manual_seed(0)) for shift in (1.0, 3.0)]
    assert all(0 < t.min() and t.max() < 1 for t in draws)
    torch.testing.assert_close(draws[1], 3 * draws[0] / (1 + 2 * draws[0]))
    assert abs(float(draws[0].mean()) - 0.5) < 0.02 < float(draws[1].mean()) - 0.6


def test_the_variance_preserving_path_is_the_table_of_its_scheduler() -> None:
    """At its timesteps, in float32 too, as diffusers' scheduler has it; between them without a jump."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(trained_betas=BETAS.numpy())
    path = VariancePreservingPath(scheduler.alphas_cumprod)
    data, noise = torch.randn(2, 3, 1, 2, 2)
    timesteps = torch.tensor([0, 500, 999])
    theirs = scheduler.add_noise(data, noise, timesteps)
    torch.testing.assert_close(path.add_noise(data, noise, timesteps / 1000), theirs)
    torch.testing.assert_close(
        path.target(data, noise, timesteps / 1000), scheduler.get_velocity(data, noise, timesteps)
    )
    t = torch.linspace(0, 0.999, 5000, dtype=torch.float64)
    assert (path.sigma(t).diff() >= 0).all() and path.sigma(t).diff().max() < 4e-3
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
