"""Path, solver and guider joined: conversions on the way, and room for steps that draw."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.diffusion.gaussian import MEAN, PATHS, STD, expectation, velocity
from unigen.diffusion.path import LinearPath, PredictionType
from unigen.diffusion.sampling import Trajectory, sample
from unigen.diffusion.solvers import SOLVERS, SchedulerSolver, StepResult, build_solver
from unigen.samplers.guidance import Guidance
from unigen.samplers.guiders import GUIDERS

NOISE = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(4, 1, 4, 4)


class EulerSDE:
    """The SDE of the linear path with the same marginals, and the log-density of each step:

    dx = (v + g^2 / (2 t) (x + (1 - t) v)) dt + g dw,    g = 0.7 sqrt(t)
    """

    prediction_type: PredictionType = "velocity"

    def __init__(self, steps: int, shift: float) -> None:
        self.timesteps: Sequence[float] = [1 - i / steps for i in range(steps)]

    def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
        t, dt, g = self.timesteps[index], 1 / len(self.timesteps), 0.7 * self.timesteps[index] ** 0.5
        mean = x_t - (prediction + g**2 / (2 * t) * (x_t + (1 - t) * prediction)) * dt
        std = torch.full_like(x_t[..., :1, :1, :1], g * dt**0.5)
        x_next = mean + std * torch.randn(x_t.shape, generator=rng, dtype=x_t.dtype)
        logprob = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).sum(1)
        return StepResult(x_next, mean, std, logprob)


class Consistency:
    """Predicted data, noised again to the next time, as consistency models draw (Song et al. 2023, algorithm 1)."""

    prediction_type: PredictionType = "data"

    def __init__(self, steps: int, shift: float) -> None:
        self.timesteps: Sequence[float] = [1 - i / steps for i in range(steps)]

    def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
        t_next = [*self.timesteps, 0.0][index + 1]
        return StepResult(LinearPath().add_noise(prediction, torch.randn(x_t.shape, generator=rng), t_next))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score"])
def test_any_prediction_is_solved(name: str, kind: PredictionType) -> None:
    """The linear path by euler, the variance preserving one by diffusers' DDIM, of whatever the network predicts."""
    if name == "linear":
        path, solver = PATHS[name], build_solver("euler", 100)
        solver.timesteps = [min(t, 0.9999) for t in solver.timesteps]  # at 1 noise does not tell the data
    else:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(250)
        path, solver = PATHS[name], SchedulerSolver(scheduler, "noise")
    found = sample(lambda x, t: [expectation(path, x, t, kind)], NOISE, solver, path=path, prediction_type=kind)
    torch.testing.assert_close(found, MEAN + STD * NOISE, atol=0.03, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_trajectory_points_at_the_data(name: str) -> None:
    """Along a constant velocity at every step; at the end x is the data."""
    noise, data = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    trajectory, found = Trajectory(noise, build_solver(name, 8)), []
    assert trajectory.denoised is noise
    while trajectory.t is not None:
        trajectory.step([noise - data])
        found.append(trajectory.progress)
        torch.testing.assert_close(trajectory.denoised, data, atol=1e-2, rtol=0)  # some begin at 0.999
    assert trajectory.denoised is trajectory.x_t
    assert found == [(n, len(found)) for n in range(1, len(found) + 1)] and len(found) == (15 if name == "heun" else 8)


def test_steps_that_draw_have_their_log_density() -> None:
    """An SDE with the flow's marginals ends at the data's distribution; its log-densities are those of its draws."""
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rng = torch.Generator().manual_seed(1)
    trajectory = Trajectory(noise, EulerSDE(100, 1.0), rng=rng)
    while trajectory.t is not None:
        result = trajectory.step([velocity(trajectory.x_t, trajectory.t)])
    assert abs(float(trajectory.x_t.mean()) - MEAN) < 0.02 and abs(float(trajectory.x_t.std()) - STD) < 0.02
    assert result.mean is not None and result.std is not None and result.logprob is not None
    z = (result.x_next - result.mean) / result.std
    expected = -(z.square() / 2 + torch.log(result.std) + 0.5 * torch.log(torch.tensor(2 * torch.pi))).flatten(1).sum(1)
    torch.testing.assert_close(result.logprob, expected)
    again = Trajectory(noise, EulerSDE(100, 1.0), rng=torch.Generator().manual_seed(1))
    while again.t is not None:
        again.step([velocity(again.x_t, again.t)])
    assert torch.equal(again.x_t, trajectory.x_t)


def test_consistency_steps_take_predicted_data() -> None:
    """A network that tells the data of every x_t gives it back, whatever is drawn on the way."""
    data = torch.randn(4, 1, 4, 4)
    found = sample(
        lambda x, t: [LinearPath().convert(data, x, t, "data", "velocity")],
        torch.randn(4, 1, 4, 4),
        Consistency(3, 1.0),
        rng=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(found, data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GUIDERS)
def test_guidance_is_off_at_one_and_outside_its_interval(name: str) -> None:
    x, c, u = torch.randn(3, 2, 4, 8, 8).unbind()

    def stepped(guidance: Guidance, predictions: list[Tensor]) -> Tensor:
        trajectory = Trajectory(x, build_solver("euler", 4), guidance)
        for _ in range(2):
            trajectory.step(predictions)
        return trajectory.x_t

    assert Guidance((1.0,), name).num_branches == 1
    off = stepped(Guidance((1.0,), name), [c])
    assert torch.equal(stepped(Guidance((5.0,), name, interval=(0.2, 0.6)), [c, u]), off)  # times 1 and 3/4
    assert not torch.equal(stepped(Guidance((5.0,), name, interval=(0.2, 0.8)), [c, u]), off)


def test_a_guider_combines_the_kind_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """apg of predicted noise on a variance preserving path is apg of the data that it stands for."""
    path, t = PATHS["variance preserving"], 0.5
    x, c, u = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64).unbind()
    seen: list[Tensor] = []
    apg = GUIDERS["apg"]

    def watched(predictions: Sequence[Tensor], scales: Sequence[float], state: object) -> Tensor:
        seen.extend(predictions)
        return predictions[0]

    monkeypatch.setitem(GUIDERS, "apg", type(apg)("apg", watched, apg.space))

    class Stop:
        prediction_type: PredictionType = "noise"
        timesteps: Sequence[float] = [t]

        def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
            return StepResult(prediction)

    trajectory = Trajectory(x, Stop(), Guidance((3.0,), "apg"), path=path, prediction_type="noise")
    trajectory.step([c, u])
    alpha, sigma = path.alpha(torch.tensor(t).double()), path.sigma(torch.tensor(t).double())
    torch.testing.assert_close(seen, [(x - sigma * c) / alpha, (x - sigma * u) / alpha])
    torch.testing.assert_close(trajectory.x_t, c)
