"""Matrix products of a decoding step, in which a few rows meet every weight once. CPU.

Such a step is bound by reading the weights, and how they lie and which way round the product is asked for decides how
fast they are read (`python scripts/bench.py decode` and `families` print it).

oneDNN's own layout of the weights is read faster than theirs. It is a second copy of them, so only the first
`MOST_BYTES` of a process have it. In bfloat16 the result is `nn.Linear`'s bit for bit, in float32 it differs by
rounding. Up to three rows of float32 are read yet faster by `W x^T`, for which nothing is copied.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

MOST = 3
"""Rows up to which `W x^T` is the faster way round in float32."""
MOST_BYTES = 4 << 30
"""Of weights that are kept in oneDNN's layout beside their own."""

_packed = WeakIdKeyDictionary()
"""By weight, then by (weights joined to one, start, stop): what was packed (the tensors, and of each its version and
its place in memory), and the packed rows (None: beyond `MOST_BYTES`). Each weight has its own part as an attribute,
too, which is found faster."""


def few_rows_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """`linear(x, weight[start:stop], bias[start:stop])`; x is (..., I) with any number of rows."""
    rows = x.numel() // x.shape[-1]
    if _packs(x, rows) and weight_OI.dtype == x.dtype:
        packed = _pack((weight_OI,), start, stop)
        if packed is not None:
            bias_O = None if bias_O is None else bias_O[start:stop]
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")  # type: ignore[no-any-return]
    weight_OI, bias_O = weight_OI[start:stop], None if bias_O is None else bias_O[start:stop]
    outputs, inputs = weight_OI.shape
    if rows > MOST or x.dtype != torch.float32 or not x.is_cpu:
        return nn.functional.linear(x, weight_OI, bias_O)
    x_RI = x.reshape(rows, inputs)
    if rows == 1:  # one row would take the matrix-vector product, which is slower than this with two
        x_RI = x_RI.repeat(2, 1)
    y_RO = (weight_OI @ x_RI.t()).t()[:rows].reshape(*x.shape[:-1], outputs)
    return y_RO if bias_O is None else y_RO + bias_O


def side_by_side(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of the layers makes of x, in one product where they are read in oneDNN's layout: it is read faster than
    several small ones, and gives the same."""
    plain = [layer for layer in layers if type(layer) is FewRowsLinear and layer.bias is None]
    alike = len(plain) == len(layers) and all(layer.weight.dtype == x.dtype for layer in plain)
    if alike and _packs(x, x.numel() // x.shape[-1]):
        packed = _pack(tuple(layer.weight for layer in plain))
        if packed is not None:
            joined = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            return joined.split([layer.out_features for layer in plain], -1)  # type: ignore[no-any-return]
    return [layer(x) for layer in layers]


def _packs(x: Tensor, rows: int) -> bool:
    """Is this what a product in oneDNN's layout is faster for?"""
    wide = x.dtype == torch.float32 and rows > MOST
    return x.is_cpu and (wide or x.dtype == torch.bfloat16) and torch.is_inference_mode_enabled()


def _pack(weights: tuple[Tensor, ...], start: int = 0, stop: int | None = None) -> Tensor | None:
    """Rows of the weights, one below another, in oneDNN's layout, made anew when one has changed; None where there is
    none. The first weight keeps it."""
    kept: Any = getattr(weights[0], "_packed", None)
    if kept is None:
        half = weights[0].dtype == torch.bfloat16
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported() if half else torch.backends.mkldnn.is_available()
        if weights[0].is_inference() or not able:
            return None
        kept = _packed[weights[0]] = weights[0]._packed = {}  # type: ignore[attr-defined]
    key = len(weights), start, stop
    tensors, was, packed = kept.get(key, ((), None, None))
    now = [(weight._version, weight.data_ptr()) for weight in weights]  # `weight.data = other` leaves the version alone
    if was != now or any(tensor() is not weight for tensor, weight in zip(tensors, weights, strict=True)):
        rows_OI = (torch.cat(weights) if len(weights) > 1 else weights[0]).detach()[start:stop].contiguous()
        others = sum(held.numel() for parts in _packed.values() for *_, held in parts.values() if held is not None)
        room = (others + rows_OI.numel()) * rows_OI.itemsize <= MOST_BYTES
        packed = torch.ops.mkldnn._reorder_linear_weight(rows_OI, 2) if room else None
        kept[key] = [weakref.ref(weight) for weight in weights], now, packed
    return packed  # type: ignore[no-any-return]


class FewRowsLinear(nn.Linear):
    """`nn.Linear` with the faster product; made of one in place by `use_few_rows`."""

    def forward(self, input: Tensor) -> Tensor:
        return few_rows_linear(input, self.weight, self.bias)


def use_few_rows(module: nn.Module) -> None:
    """Let every `nn.Linear` inside use the faster product from now on. For inference."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = FewRowsLinear
