"""Solvers: how x goes from noise to data, one evaluation of the network at a time. Found by name in `SOLVERS`.

    solver = build_solver("heun", steps=20, shift=3.0)
    for index, t in enumerate(solver.timesteps):
        x_t = solver.step(network(x_t, t), index, x_t).x_next

A new solver is one function here with `@solver(name)` that returns a `Solver`. Those of this file are schedulers of
diffusers and follow the velocity of the linear path,

    x_t = (1 - t) data + t noise,    velocity = noise - data,    t from 1 (noise) to 0 (data)

at times with the resolution shift of Esser et al. 2024 (SD3, eq. 23), t' = a t / (1 + (a - 1) t), applied once.
Does not depend on: guidance, networks, paths. torch, numpy and diffusers are imported where a solver is built, so that
the command line can list the names without them.

Shapes: x and predictions are (M, ...) of one shape; K evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    import torch
    from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from torch import Tensor

    Scheduler = (
        FlowMatchEulerDiscreteScheduler
        | FlowMatchHeunDiscreteScheduler
        | DPMSolverMultistepScheduler
        | UniPCMultistepScheduler
        | DEISMultistepScheduler
    )

MAX_STEPS = 250
"""Most steps; with more, the whole-numbered times of some solvers meet."""


@dataclass(frozen=True)
class StepResult:
    """One step of a solver."""

    x_next: Tensor
    """x (M, ...) at the next time."""
    mean: Tensor | None = None
    """Mean (M, ...) of the distribution that x_next was drawn from; None where the step is deterministic."""
    std: Tensor | None = None
    """Its standard deviation (M, 1, ...)."""
    logprob: Tensor | None = None
    """Log-density (M,) of x_next in nats, summed over its values."""


class Solver(Protocol):
    """One way from noise to data. It may remember earlier steps: build a new one for each trajectory."""

    prediction_type: Literal["velocity", "data", "noise", "score"]
    """Kind of prediction that `step` takes."""
    timesteps: Sequence[float]
    """Times (K,) in [0, 1] at which the network is evaluated, in order."""

    def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
        """One step.

        Args:
            prediction: (M, ...), of the network at x_t and `timesteps[index]`.
            index: number of this evaluation, from 0, one after the other.
            x_t: (M, ...).
            rng: random generator of a stochastic solver; solvers of an ODE do not use it.

        Returns:
            Where the step leads, at `timesteps[index + 1]`, in the end at 0.
        """
        ...


SolverFactory = Callable[[int, float], Solver]
"""Builds a solver from a number of steps, from 1 to MAX_STEPS, and the resolution shift."""
SOLVERS: dict[str, SolverFactory] = {}
"""All solvers by name, in the order in which they are listed to users."""


def solver(name: str) -> Callable[[SolverFactory], SolverFactory]:
    """A decorator that registers a function in `SOLVERS` and returns it as it is."""

    def register(factory: SolverFactory) -> SolverFactory:
        SOLVERS[name] = factory
        return factory

    return register


def build_solver(name: str, steps: int, shift: float = 1.0) -> Solver:
    """A new solver.

    Args:
        name: one of `SOLVERS`.
        steps: from 1 to MAX_STEPS. heun evaluates the network 2 steps - 1 times, the others once a step.
        shift: of the times towards noise, above 0; 1 is none.

    Raises:
        ValueError: for an unknown solver or a number of steps out of range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from 1 to {MAX_STEPS}, not {steps}")
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift)


class SchedulerSolver:
    """A scheduler of diffusers, its times set, as a solver."""

    def __init__(
        self, scheduler: Scheduler, prediction_type: Literal["velocity", "data", "noise"] = "velocity"
    ) -> None:
        """
        Args:
            scheduler: with its timesteps set, at which no step has been taken.
            prediction_type: what it takes; `velocity` is noise - data for a flow scheduler, else diffusers'
                "v_prediction".
        """
        self.scheduler = scheduler
        self.prediction_type: Literal["velocity", "data", "noise", "score"] = prediction_type
        num_train_timesteps = scheduler.config["num_train_timesteps"]
        self.timesteps: Sequence[float] = [float(t) / num_train_timesteps for t in scheduler.timesteps]

    def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
        """As `Solver.step`."""
        step = cast("Callable[..., tuple[Tensor, ...]]", self.scheduler.step)  # some are typed for a FloatTensor
        x_next = step(prediction, self.scheduler.timesteps[index], x_t, return_dict=False)[0]
        return StepResult(x_next)


class ToDataSolver(SchedulerSolver):
    """The same, for a scheduler of a flow that would rest short of the data: its last step goes on to t = 0."""

    def step(self, prediction: Tensor, index: int, x_t: Tensor, rng: torch.Generator | None = None) -> StepResult:
        """See `Solver.step`."""
        last_t = float(self.scheduler.sigmas[-1])
        if index + 1 == len(self.timesteps) and last_t > 0:
            return StepResult(x_t - last_t * prediction)
        return super().step(prediction, index, x_t, rng)


@solver("euler")
def euler(steps: int, shift: float) -> Solver:
    """Order 1: x + (t_next - t) velocity."""
    import numpy as np
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())  # by steps alone they are shifted twice
    return SchedulerSolver(scheduler)


@solver("heun")
def heun(steps: int, shift: float) -> Solver:
    """Order 2: the mean of the velocities at both ends of a step, the last step euler's."""
    from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return SchedulerSolver(scheduler)


@solver("dpm++")
def dpm_plus_plus(steps: int, shift: float) -> Solver:
    """DPM-Solver++ of order 2, multistep (Lu et al. 2022, arXiv 2211.01095)."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return SchedulerSolver(scheduler)


@solver("unipc")
def unipc(steps: int, shift: float) -> Solver:
    """UniPC of order 2 (Zhao et al. 2023, arXiv 2302.04867)."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return SchedulerSolver(scheduler)


@solver("deis")
def deis(steps: int, shift: float) -> Solver:
    """DEIS of order 2 (Zhang and Chen 2022, arXiv 2204.13902)."""
    from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler

    scheduler = DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return ToDataSolver(scheduler)
