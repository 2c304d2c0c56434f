"""Each guider against its paper's formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unigen.samplers.guidance import Guidance
from unigen.samplers.guiders import GUIDERS, RESCALE_FACTOR, GuiderState

C, U = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def combine(name: str, predictions: list[Tensor], scale: float = 4.0, state: GuiderState | None = None) -> Tensor:
    return GUIDERS[name].combine(predictions, (scale,), state or GuiderState(num_evaluations=1))


def test_cfg() -> None:
    torch.testing.assert_close(combine("cfg", [C, U]), U + 4 * (C - U))
    middle = (C + U).square()
    chain = GUIDERS["cfg"].combine([C, middle, U], (2.0, 0.5), GuiderState())
    torch.testing.assert_close(chain, U + 2 * (C - middle) + 0.5 * (middle - U))


def test_rescale() -> None:
    """Lin et al. 2024, eq. 15 and 16."""
    guided = U + 4 * (C - U)
    ratio = C.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(
        combine("rescale", [C, U]), RESCALE_FACTOR * guided * ratio + (1 - RESCALE_FACTOR) * guided
    )


def test_apg() -> None:
    """Sadat et al. 2024: what is parallel to c is left out of the difference, whose running sum has momentum -0.5."""
    state, running = GuiderState(), torch.zeros_like(C)
    for step in range(3):
        cond, uncond = C + step, U * (1 + step)
        running = cond - uncond - 0.5 * running
        orthogonal = running - dot(running, cond) / dot(cond, cond) * cond
        torch.testing.assert_close(combine("apg", [cond, uncond], state=state), cond + 3 * orthogonal)
    assert GUIDERS["apg"].space == "data"
    without_momentum = combine("apg", [cond, uncond])  # the control: a new state
    assert (without_momentum - (cond + 3 * orthogonal)).abs().max() > 1e-2


def test_cfg_zero() -> None:
    """Fan et al. 2025: u scaled by its best fit to c; no velocity at the first evaluation."""
    fit = dot(C, U) / dot(U, U)
    torch.testing.assert_close(combine("cfg-zero", [C, U]), fit * U + 4 * (C - fit * U), atol=1e-5, rtol=1e-5)
    assert not combine("cfg-zero", [C, U], state=GuiderState()).any()
    assert GUIDERS["cfg-zero"].min_steps == 2


def test_bad_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown guider 'cgf': one of {', '.join(GUIDERS)}"):
        Guidance((3.0,), "cgf")
    with pytest.raises(ValueError, match="the guider apg combines two branches: give one scale"):
        Guidance((3.0, 2.0), "apg")
    with pytest.raises(ValueError, match="now called guider"):
        Guidance((3.0,), kind="apg")
