"""From noise to data along a learnt velocity: diffusers' samplers, in one call (`solve`) or velocity by velocity
(`ODESolver`).

    x_t = (1 - t) data + t noise,    velocity = noise - data,    t from 1 (noise) to 0 (data)

Resolution shift (Esser et al. 2024, SD3, eq. 23): t' = a t / (1 + (a - 1) t), applied once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

SOLVERS = ("euler", "heun", "dpm++", "unipc", "deis")
MAX_STEPS = 250
"""Steps; with more, the whole-numbered times of some samplers meet."""


def build_scheduler(sampler: str, steps: int, shift: float = 1.0) -> Any:
    """A diffusers scheduler with its times set. ValueError for an unknown sampler or number of steps."""
    import diffusers

    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from 1 to {MAX_STEPS}, not {steps}")
    if sampler not in SOLVERS:
        raise ValueError(f"unknown sampler {sampler!r}: one of {', '.join(SOLVERS)}")
    if sampler == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(
            sigmas=np.linspace(1, 1 / steps, steps).tolist()
        )  # by steps alone they are shifted twice
        return scheduler
    if sampler == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler_classes = {
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "deis": diffusers.DEISMultistepScheduler,
    }
    scheduler = scheduler_classes[sampler](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


class ODESolver:
    """A way from noise to data that waits for each velocity. x: where it is; t: the time there, in [0, 1], or None at
    the end; way: velocities taken, and of how many: heun's are 2 steps - 1, the others' as many as there are steps."""

    def __init__(self, noise: Tensor, steps: int, sampler: str = "euler", shift: float = 1.0) -> None:
        self.x = noise
        self._scheduler = build_scheduler(sampler, steps, shift)
        self._index = 0
        self._last_evaluation = noise, 0.0, noise  # x, t, and the velocity there

    @property
    def progress(self) -> tuple[int, int]:
        return self._index, len(self._scheduler.timesteps)

    @property
    def data(self) -> Tensor:
        """The data that the last velocity points at, x - t v; at the end x itself."""
        x, t, velocity = self._last_evaluation
        return self.x if self.t is None else x - t * velocity

    @property
    def t(self) -> float | None:
        times = self._scheduler.timesteps
        return float(times[self._index]) / 1000 if self._index < len(times) else None

    def go(self, velocity: Tensor) -> None:
        """On, by the velocity (noise - data) at x and t."""
        scheduler, time = self._scheduler, self._scheduler.timesteps[self._index]
        self._last_evaluation = self.x, float(time) / 1000, velocity
        self._index += 1
        if self.t is None and scheduler.sigmas[-1] > 0:  # deis would rest here, short of the data
            self.x = self.x - float(scheduler.sigmas[-1]) * velocity
        else:
            self.x = scheduler.step(velocity, time, self.x, return_dict=False)[0]


def solve(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, sampler: str = "euler", shift: float = 1.0
) -> Tensor:
    """Data from noise (B, ...). velocity(x, t): noise - data at time t in [0, 1], of x's shape."""
    trajectory = ODESolver(noise, steps, sampler, shift)
    while trajectory.t is not None:
        trajectory.go(velocity(trajectory.x, trajectory.t))
    return trajectory.x
