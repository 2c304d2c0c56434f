"""Guiders: one prediction from those of several branches of one context. Pure functions, found by name in `GUIDERS`.

    prediction = GUIDERS["apg"].combine((cond, uncond), (3.0,), GuiderState())

A new guider is one function here with `@guider(name)`: the options, their checks and the samplers find it by its name.
Does not depend on: schedules, solvers, networks. torch and diffusers are imported where a guider runs, so that the
command line can list the names without them.

Shapes: predictions and results are (M, ...), all of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
    from torch import Tensor

RESCALE_FACTOR = 0.7
"""Share of the rescaled prediction (Lin et al. 2024, section 3.4)."""
APG_MOMENTUM = -0.5
"""Momentum of APG's running difference (Sadat et al. 2024, section 5)."""


@dataclass
class GuiderState:
    """What a guider remembers along one trajectory. New for each trajectory, and the same in all of its steps."""

    num_evaluations: int = 0
    """Evaluations of the network before this one, with and without guidance."""
    momentum: MomentumBuffer | None = None
    """Running difference of the branches (apg)."""


class CombineFunction(Protocol):
    """Combines the predictions of the branches, strongest condition first."""

    def __call__(self, predictions: Sequence[Tensor], scales: Sequence[float], state: GuiderState) -> Tensor:
        """Combine the predictions.

        Args:
            predictions: two or more tensors (M, ...) of the kind that `Guider.space` names.
            scales: one for each prediction but the last.
            state: of this trajectory; the function may change it.

        Returns:
            The guided prediction (M, ...), of the same kind.
        """
        ...


@dataclass(frozen=True)
class Guider:
    """A way to combine branches, with what it asks of a request."""

    name: str
    """As users write it."""
    combine: CombineFunction
    """The function."""
    space: Literal["velocity", "data", "noise", "score"] | None = None
    """Kind of prediction that it combines; None is whatever the network predicts."""
    combines_chains: bool = False
    """Does it combine more than two branches?"""
    min_steps: int = 1
    """Fewest steps of a solver with which it gives a picture."""


GUIDERS: dict[str, Guider] = {}
"""All guiders by name, in the order in which they are listed to users."""


def guider(
    name: str,
    *,
    space: Literal["velocity", "data", "noise", "score"] | None = None,
    combines_chains: bool = False,
    min_steps: int = 1,
) -> Callable[[CombineFunction], CombineFunction]:
    """Register a function in `GUIDERS`.

    Args:
        name: as users write it.
        space: kind of prediction that it combines; None is whatever the network predicts.
        combines_chains: does it combine more than two branches?
        min_steps: fewest steps of a solver with which it gives a picture.

    Returns:
        A decorator that returns the function as it is.
    """

    def register(combine: CombineFunction) -> CombineFunction:
        GUIDERS[name] = Guider(name, combine, space, combines_chains, min_steps)
        return combine

    return register


def combine_chain(predictions: Sequence[Tensor], scales: Sequence[float], weight: float = 1.0) -> Tensor:
    """p_n + sum_i s_i (p_i - p_(i+1)) of branches p_1 .. p_n: the chain of InstructPix2Pix (Brooks et al. 2023, eq. 3).

    Args:
        predictions: n tensors of one shape, strongest condition first: logits or predictions of a flow.
        scales: the n - 1 scales s_i.
        weight: share of the guidance that counts, from 0 (all scales 1) to 1.

    Returns:
        A tensor of the same shape.
    """
    result = predictions[-1]
    for scale, strong, weak in zip(scales, predictions, predictions[1:], strict=False):
        result = result + (1 + (scale - 1) * weight) * (strong - weak)
    return result


@guider("cfg", combines_chains=True)
def cfg(predictions: Sequence[Tensor], scales: Sequence[float], state: GuiderState) -> Tensor:
    """u + s (c - u) (Ho and Salimans 2022, eq. 6, written with s = 1 + w); with more branches their chain."""
    return combine_chain(predictions, scales)


@guider("rescale")
def rescale(predictions: Sequence[Tensor], scales: Sequence[float], state: GuiderState) -> Tensor:
    """cfg, with its standard deviation drawn towards that of c (Lin et al. 2024, eq. 15 and 16)."""
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    return rescale_noise_cfg(combine_chain(predictions, scales), predictions[0], RESCALE_FACTOR)


@guider("apg", space="data")
def apg(predictions: Sequence[Tensor], scales: Sequence[float], state: GuiderState) -> Tensor:
    """c + (s - 1) d, where d is the running c - u without its part parallel to c, of predictions of the data (Sadat et
    al. 2024, arXiv 2410.02416, algorithm 1 with eta 0, negative momentum and no threshold on the norm)."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    if state.momentum is None:
        state.momentum = MomentumBuffer(APG_MOMENTUM)
    cond, uncond = predictions
    return normalized_guidance(cond, uncond, scales[0] - 1, state.momentum, eta=0.0, use_original_formulation=True)


@guider("cfg-zero", space="velocity", min_steps=2)
def cfg_zero(predictions: Sequence[Tensor], scales: Sequence[float], state: GuiderState) -> Tensor:
    """cfg with u scaled by its best fit to c, and no velocity at the first evaluation (Fan et al. 2025, CFG-Zero*)."""
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    cond, uncond = predictions
    if state.num_evaluations == 0:
        return cond.new_zeros(cond.shape)
    scale = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).reshape(-1, *[1] * (cond.ndim - 1))
    return combine_chain((cond, uncond * scale), scales)
