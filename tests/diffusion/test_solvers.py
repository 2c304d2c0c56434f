"""Solvers on a Gaussian, whose flow is known: x(t) = (1 - t) MEAN + sqrt((1 - t)^2 STD^2 + t^2) z."""

from __future__ import annotations

import math

import pytest
import torch

from tests.diffusion.gaussian import MEAN, STD, velocity
from unigen.diffusion.sampling import sample
from unigen.diffusion.solvers import SOLVERS, build_solver

NOISE = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)


def error(name: str, steps: int, shift: float = 1.0) -> float:
    found = sample(lambda x, t: [velocity(x, t)], NOISE, build_solver(name, steps, shift))
    return float((found - (MEAN + STD * NOISE)).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_they_converge_to_the_closed_form(name: str) -> None:
    errors = [error(name, steps) for steps in (8, 16, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


@pytest.mark.parametrize(
    ("name", "order", "steps"), [("euler", 1, 32), ("heun", 2, 32), ("dpm++", 2, 8), ("unipc", 2, 8), ("deis", 2, 8)]
)
def test_the_order_of_accuracy(name: str, order: int, steps: int) -> None:
    """Half the step divides the error by 2^order; with more steps the rounded times of some solvers show."""
    found = math.log2(error(name, steps) / error(name, 2 * steps))
    assert order - 0.1 < found < order + 0.7


def test_the_shift_is_applied_once() -> None:
    """SD3, eq. 23, on times 1, 3/4, 1/2, 1/4."""
    times = build_solver("euler", 4, 3.0).timesteps
    assert times == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25)], abs=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_they_go_all_the_way(name: str, shift: float) -> None:
    """Along a constant velocity any number of steps is exact."""
    for steps in (1, 2, 20):
        end = sample(lambda x, t: [torch.ones_like(x)], torch.zeros(1, 1, 2, 2), build_solver(name, steps, shift))
        torch.testing.assert_close(end, -torch.ones(1, 1, 2, 2), atol=2e-3, rtol=0)  # some begin at 0.999


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be from 1 to 250"):
        build_solver("unipc", 1200)
    with pytest.raises(ValueError, match="unknown solver 'rk9': one of euler"):
        build_solver("rk9", 2)
