"""Samplers on a Gaussian, whose flow is known: data ~ N(m, s^2) gives x(t) = (1 - t) m + sqrt((1-t)^2 s^2 + t^2) z."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unigen.diffusion.solvers import SOLVERS, ODESolver, solve

MEAN, SPREAD = 0.7, 0.4


def velocity(x: Tensor, t: float) -> Tensor:
    spread = math.sqrt((1 - t) ** 2 * SPREAD**2 + t**2)
    z = (x - (1 - t) * MEAN) / spread
    return -MEAN + (t - (1 - t) * SPREAD**2) / spread * z


def error(sampler: str, steps: int, shift: float = 1.0) -> float:
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    return float((solve(velocity, noise, steps, sampler, shift) - (MEAN + SPREAD * noise)).abs().max())


@pytest.mark.parametrize("sampler", SOLVERS)
def test_they_converge_to_the_closed_form(sampler: str) -> None:
    errors = [error(sampler, steps) for steps in (8, 16, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_the_order_of_euler_is_one_and_others_beat_it() -> None:
    halved = error("euler", 64) / error("euler", 32)
    assert 0.45 < halved < 0.6
    for sampler in ("heun", "dpm++", "unipc", "deis"):
        assert error(sampler, 16) < 0.6 * error("euler", 16)


def test_the_shift_is_applied_once() -> None:
    """SD3, eq. 23, on times 1, 3/4, 1/2, 1/4."""
    times: list[float] = []
    solve(lambda x, t: times.append(t) or velocity(x, t), torch.zeros(1, 1, 2, 2), 4, "euler", shift=3.0)
    assert times == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25)], abs=1e-6)


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_they_go_all_the_way(sampler: str, shift: float) -> None:
    """Along a constant velocity any number of steps is exact."""
    for steps in (1, 2, 20):
        end = solve(lambda x, t: torch.ones_like(x), torch.zeros(1, 1, 2, 2), steps, sampler, shift)
        torch.testing.assert_close(end, -torch.ones(1, 1, 2, 2), atol=2e-3, rtol=0)  # some begin at 0.999


@pytest.mark.parametrize("sampler", SOLVERS)
def test_on_the_way_they_know_where_it_leads(sampler: str) -> None:
    """Along a constant velocity every one points at the data; at the end x is it."""
    noise, data = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    way, ways = ODESolver(noise, 8, sampler), []
    while way.t is not None:
        way.go(noise - data)
        ways.append(way.progress)
        torch.testing.assert_close(way.data, data, atol=1e-2, rtol=0)  # some begin at 0.999
    assert way.data is way.x
    assert ways == [(n, len(ways)) for n in range(1, len(ways) + 1)] and len(ways) == (15 if sampler == "heun" else 8)


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be from 1 to 250"):
        solve(velocity, torch.zeros(1, 1, 2, 2), 1200, "unipc")


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="unknown sampler 'rk9': one of euler"):
        solve(velocity, torch.zeros(1, 1, 2, 2), 2, "rk9")
