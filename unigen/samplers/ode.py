"""From noise to data along a learnt velocity: diffusers' samplers behind one function. Pure: (velocity, x, ..) -> x.

    x_t = (1 - t) data + t noise,    velocity = noise - data,    t from 1 (noise) to 0 (data)

Resolution shift (Esser et al. 2024, SD3, eq. 23): t' = a t / (1 + (a - 1) t), applied once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

SAMPLERS = ("euler", "heun", "dpm++", "unipc", "deis")
MOST = 250
"""Steps; with more, the whole-numbered times of some samplers meet."""


def scheduler(sampler: str, steps: int, shift: float = 1.0) -> Any:
    """A diffusers scheduler with its times set. ValueError for an unknown sampler or number of steps."""
    import diffusers

    if not 1 <= steps <= MOST:
        raise ValueError(f"steps must be from 1 to {MOST}, not {steps}")
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: one of {', '.join(SAMPLERS)}")
    if sampler == "euler":
        made = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        made.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())  # by steps alone they are shifted twice
        return made
    if sampler == "heun":
        made = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        made.set_timesteps(steps)
        return made
    kinds = {
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "deis": diffusers.DEISMultistepScheduler,
    }
    made = kinds[sampler](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    made.set_timesteps(steps)
    return made


def solve(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, sampler: str = "euler", shift: float = 1.0
) -> Tensor:
    """Data from noise (B, C, h, w). velocity(x, t): noise - data at time t in [0, 1], of x's shape. heun calls it
    2 steps - 1 times, the others as often as there are steps."""
    made, x = scheduler(sampler, steps, shift), noise
    for i, time in enumerate(made.timesteps):
        v = velocity(x, float(time) / 1000)
        if i + 1 == len(made.timesteps) and made.sigmas[-1] > 0:  # deis would rest here, short of the data
            return x - float(made.sigmas[-1]) * v
        x = made.step(v, time, x, return_dict=False)[0]
    return x
