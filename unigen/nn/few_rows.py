"""Matrix products of a decoding step, in which one to four rows meet every weight once. CPU, fp32.

Such a step is bound by reading the weights, and which way round the product is asked for decides how fast they are
read: `W x^T` reads them several times as fast as `x W^T` (`python scripts/bench.py decode` prints both). Nothing is
copied or laid anew; the result differs from `nn.Linear` by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 4
"""Rows up to which `W x^T` is the faster way round."""


def few_rows_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`linear(x, weight, bias)`; x is (..., I) with any number of rows."""
    outputs, inputs = weight_OI.shape
    rows = x.numel() // inputs
    if rows > MOST or x.dtype != torch.float32 or not x.is_cpu:
        return nn.functional.linear(x, weight_OI, bias_O)
    x_RI = x.reshape(rows, inputs)
    if rows == 1:  # one row would take the matrix-vector product, which is slower than this with two
        x_RI = x_RI.repeat(2, 1)
    y_RO = (weight_OI @ x_RI.t()).t()[:rows].reshape(*x.shape[:-1], outputs)
    return y_RO if bias_O is None else y_RO + bias_O


class FewRowsLinear(nn.Linear):
    """`nn.Linear` with the faster product; made of one in place by `use_few_rows`."""

    def forward(self, input: Tensor) -> Tensor:
        return few_rows_linear(input, self.weight, self.bias)


def use_few_rows(module: nn.Module) -> None:
    """Let every `nn.Linear` inside use the faster product from now on. For inference."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = FewRowsLinear
