"""The faster product is the same product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unigen.nn.few_rows import FewRowsLinear, few_rows_linear, use_few_rows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_linear(rows: int, shape: tuple[int, int], bias: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=rng), torch.randn(rows, 1, shape[1], generator=rng)
    b = torch.randn(shape[0], generator=rng) if bias else None
    torch.testing.assert_close(few_rows_linear(x, weight, b), nn.functional.linear(x, weight, b))
    half = few_rows_linear(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == (rows, 1, shape[0])


def test_modules_are_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False)), nn.LayerNorm(4))
    x, names = torch.randn(2, 8), list(model.state_dict())
    before = model(x)
    use_few_rows(model)
    assert sum(isinstance(m, FewRowsLinear) for m in model.modules()) == 2 and list(model.state_dict()) == names
    torch.testing.assert_close(model(x), before)
