"""From noise to data: a solver, a guider and a path joined, evaluation by evaluation (`Trajectory`) or in one call.

    predict = predict_branches(denoiser, [prompt_embeds, empty_prompt_embeds])
    data = sample(predict, noise, build_solver("euler", 20), Guidance((3.0,)))

Of the three none knows the others: predictions are converted here to the kind that each of them takes.

Shapes: x and predictions are (M, ...) of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unigen.diffusion.denoiser import Denoiser, PromptEmbeds
from unigen.diffusion.path import LinearPath, Path, PredictionType
from unigen.diffusion.solvers import Solver, StepResult
from unigen.samplers.guidance import Guidance
from unigen.samplers.guiders import GUIDERS, GuiderState

NO_GUIDANCE = Guidance((1.0,))
PredictFunction = Callable[[Tensor, float], Sequence[Tensor]]
"""Predictions (M, ...) of the branches of guidance at x_t (M, ...) and t, strongest condition first."""


class Trajectory:
    """A way from noise to data that waits for each prediction of the network."""

    def __init__(
        self,
        noise: Tensor,
        solver: Solver,
        guidance: Guidance = NO_GUIDANCE,
        *,
        path: Path | None = None,
        prediction_type: PredictionType = "velocity",
        rng: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            noise: (M, ...).
            solver: a new one.
            guidance: how the branches are combined.
            path: by which predictions are converted; None is `LinearPath()`.
            prediction_type: what the network predicts.
            rng: random generator of a stochastic solver.
        """
        self.x_t = noise
        """Where it is (M, ...)."""
        self._solver, self._guidance, self._path = solver, guidance, path or LinearPath()
        self._prediction_type, self._rng = prediction_type, rng
        self._guider_state = GuiderState()
        self._index = 0
        self._last_evaluation: tuple[Tensor, float, Tensor] | None = None  # x_t, t, and the guided prediction there

    @property
    def t(self) -> float | None:
        """The time at x_t, from 1 (noise) to 0 (data); None at the end."""
        return self._solver.timesteps[self._index] if self._index < len(self._solver.timesteps) else None

    @property
    def progress(self) -> tuple[int, int]:
        """Evaluations that are done, and of how many."""
        return self._index, len(self._solver.timesteps)

    @property
    def denoised(self) -> Tensor:
        """The data (M, ...) that the last prediction points at; at the end x_t itself, and so before the first."""
        if self.t is None or self._last_evaluation is None:
            return self.x_t
        x_t, t, prediction = self._last_evaluation
        return self._path.convert(prediction, x_t, t, self._prediction_type, "data")

    def step(self, predictions: Sequence[Tensor]) -> StepResult:
        """One step on.

        Args:
            predictions: (M, ...) of each branch of the guidance at x_t and t, strongest condition first.

        Returns:
            The solver's; `x_t` is its x_next.
        """
        x_t, t = self.x_t, self.t
        assert t is not None
        guided = self._guide(predictions, x_t, t)
        self._last_evaluation = x_t, t, guided
        converted = self._path.convert(guided, x_t, t, self._prediction_type, self._solver.prediction_type)
        result = self._solver.step(converted, self._index, x_t, self._rng)
        self.x_t = result.x_next
        self._index += 1
        return result

    def _guide(self, predictions: Sequence[Tensor], x_t: Tensor, t: float) -> Tensor:
        """One prediction (M, ...) from those of the branches."""
        result = predictions[0]
        if len(predictions) > 1 and self._guidance.applies_at(t):
            guider = GUIDERS[self._guidance.guider]
            space = guider.space or self._prediction_type
            converted = [self._path.convert(p, x_t, t, self._prediction_type, space) for p in predictions]
            guided = guider.combine(converted, self._guidance.scales, self._guider_state)
            result = self._path.convert(guided, x_t, t, space, self._prediction_type)
        self._guider_state.num_evaluations += 1
        return result


def predict_branches(
    denoiser: Denoiser,
    conditions: Sequence[PromptEmbeds],
    *,
    mask: Tensor | None = None,
    guidance: Tensor | None = None,
) -> PredictFunction:
    """A denoiser's predictions of the branches of guidance, one evaluation a branch.

    Args:
        denoiser: of the network.
        conditions: of each branch, strongest first.
        mask: as `Denoiser` takes it, of all branches.
        guidance: as `Denoiser` takes it, of all branches.

    Returns:
        What `sample` takes.
    """

    def predict(x_t: Tensor, t: float) -> Sequence[Tensor]:
        t_M = torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device)
        return [denoiser(x_t, t_M, condition, mask, guidance) for condition in conditions]

    return predict


def sample(
    predict: PredictFunction,
    noise: Tensor,
    solver: Solver,
    guidance: Guidance = NO_GUIDANCE,
    *,
    path: Path | None = None,
    prediction_type: PredictionType = "velocity",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Data from noise.

    Args:
        predict: the network's predictions of all branches.
        noise: (M, ...), where it begins.
        solver: a new one.
        guidance: how the branches are combined.
        path: between data and noise; None is the linear one.
        prediction_type: what the network predicts.
        rng: random generator of a stochastic solver.

    Returns:
        Data (M, ...).
    """
    trajectory = Trajectory(noise, solver, guidance, path=path, prediction_type=prediction_type, rng=rng)
    while (t := trajectory.t) is not None:
        trajectory.step(predict(trajectory.x_t, t))
    return trajectory.x_t
