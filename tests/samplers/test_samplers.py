"""What is cut is never drawn, what is left is drawn in proportion, and guidance is the chain its docstring says."""

from __future__ import annotations

import math

import pytest
import torch

from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions, sample, warp


def rngs(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_top_k_keeps_the_k_best() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert warp(logits, SamplingOptions(top_k=2)).isfinite().tolist() == [[False, True, False, True]]


def test_top_p_keeps_the_least_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert warp(logits, SamplingOptions(top_p=0.6)).isfinite().tolist() == [[True, True, False, False]]
    assert warp(logits, SamplingOptions(top_p=0.5)).isfinite().tolist() == [[True, False, False, False]]
    assert warp(logits, SamplingOptions(top_p=1e-300)).isfinite().tolist() == [[True, False, False, False]]
    assert warp(logits[:, [3, 1, 0, 2]], SamplingOptions(top_p=0.6)).isfinite().tolist() == [[False, True, True, False]]


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.55, 0.25, 0.15, 0.05])
    count = 8000
    ids = sample(p.log().expand(count, 4), SamplingOptions(), rngs(count))
    shares = torch.bincount(ids, minlength=4) / count
    assert (shares - p).abs().max() < 5 * math.sqrt(0.25 / count)
    hot = (
        torch.bincount(sample(p.log().expand(count, 4), SamplingOptions(temperature=2.0), rngs(count)), minlength=4)
        / count
    )
    assert (hot - p.sqrt() / p.sqrt().sum()).abs().max() < 5 * math.sqrt(0.25 / count)


def test_a_row_draws_from_its_own_generator() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = sample(logits, SamplingOptions(), rngs(3))
    alone = [int(sample(logits[i : i + 1], SamplingOptions(), [rngs(3)[i]])) for i in range(3)]
    assert together.tolist() == alone


def test_greedy_draws_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert sample(torch.tensor([[0.0, 2.0, 1.0]]), SamplingOptions(temperature=0), [rng]).tolist() == [1]
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize(
    "options", [{"temperature": math.nan}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_guidance() -> None:
    c, i, u = torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([1.0])
    assert Guidance((3.0,)).combine([c, u]).item() == 1 + 3 * (3 - 1)
    assert Guidance((1.0,)).num_branches == 1 and Guidance((1.0,)).combine([c]) is c
    assert Guidance((0.0,)).combine([c, u]).item() == 1
    assert Guidance((2.0, 0.5)).combine([c, i, u]).item() == 1 + 2 * (3 - 2) + 0.5 * (2 - 1)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="guidance must be"):
            Guidance.from_value(bad)
