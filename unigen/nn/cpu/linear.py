"""Matrix products of a decoding step, in which a few rows meet every weight once. CPU.

Such a step is bound by reading the weights, and how they lie and which way round the product is asked for decides how
fast they are read (`python scripts/bench.py decode` and `families` print it).

oneDNN's own layout of the weights is read faster than theirs. It is a second copy of them, so only the first
`MAX_PACKED_BYTES` of a process have it. In bfloat16 the result is `nn.Linear`'s bit for bit, in float32 it differs by
rounding. A few rows of float32 (`MAX_PASSAGE_TOKENS`) are read yet faster by `W x^T`, for which no second copy is made:
weights of layers that read the same are moved to lie one below another.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

MAX_TRANSPOSED_ROWS = 3 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
"""Rows up to which `W x^T` is the faster way round in float32, and faster than oneDNN's layout."""
MAX_PACKED_BYTES = 4 << 30
"""Of weights that are kept in oneDNN's layout beside their own."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_packed_weights = WeakIdKeyDictionary()
"""By weight, then by (weights joined to one, start, stop): what was packed (the tensors, and of each its version and
its place in memory), and the packed rows (None: beyond `MAX_PACKED_BYTES`). Each weight has its own part as an
attribute, too, which is found faster."""


def packed_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """`linear(x, weight[start:stop], bias[start:stop])`; x is (..., I) with any number of rows."""
    rows = x.numel() // x.shape[-1]
    if start or stop is not None:
        part_OI, part_O = weight_OI[start:stop], None if bias_O is None else bias_O[start:stop]
    else:
        part_OI, part_O = weight_OI, bias_O
    if rows <= MAX_TRANSPOSED_ROWS and x.dtype == torch.float32 and x.is_cpu:
        y = _transposed_linear(x, part_OI, rows)
        return y if part_O is None else y + part_O
    if _should_pack(x, rows) and weight_OI.dtype == x.dtype:
        packed_weight = _pack_weights((weight_OI,), start, stop)
        if packed_weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed_weight, part_O, "none", [], "")  # type: ignore[no-any-return]
    return nn.functional.linear(x, part_OI, part_O)


def _transposed_linear(x: Tensor, weight_OI: Tensor, rows: int) -> Tensor:
    """`W x^T`, transposed. One row is doubled: it would take the matrix-vector product, which is slower than two."""
    outputs, inputs = weight_OI.shape
    x_RI = x.reshape(rows, inputs)
    if rows == 1:
        return (weight_OI @ torch.cat((x_RI, x_RI)).t())[:, 0].view(*x.shape[:-1], outputs)
    return (weight_OI @ x_RI.t()).t().reshape(*x.shape[:-1], outputs)


def fused_linears(x: Tensor, *groups: Sequence[nn.Linear]) -> list[Tensor]:
    """What the layers of each group make of x, joined along the last dimension.

    Where the layers allow it, it is one product, which is faster than several small ones and gives the same up to
    rounding in float32: for few rows where `pack_linears` has laid their weights one below another, for more in
    oneDNN's layout."""
    layers = [layer for group in groups for layer in group]
    plain = [layer._parameters for layer in layers if type(layer) is PackedLinear]
    if x.is_cpu and len(plain) == len(layers) and not any([own["bias"] is not None for own in plain]):
        weights, rows = [own["weight"] for own in plain], x.numel() // x.shape[-1]
        fused = None
        if rows <= MAX_TRANSPOSED_ROWS and x.dtype == torch.float32 and not torch.is_grad_enabled():
            if (weight_OI := _fused_view(weights)) is not None:  # type: ignore[arg-type]
                fused = _transposed_linear(x, weight_OI, rows)
        elif _should_pack(x, rows) and all(weight.dtype == x.dtype for weight in weights):  # type: ignore[union-attr]
            if (packed_weight := _pack_weights(tuple(weights))) is not None:  # type: ignore[arg-type]
                fused = torch.ops.mkldnn._linear_pointwise(x, packed_weight, None, "none", [], "")
        if fused is not None:
            sizes = [sum([layer.out_features for layer in group]) for group in groups]
            return list(fused.split_with_sizes(sizes, -1))  # type: ignore[arg-type]
    parts = [[layer(x) for layer in group] for group in groups]
    return [torch.cat(part, -1) if len(part) > 1 else part[0] for part in parts]


def _fused_view(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one, where each begins in memory where the one before it ends. The check is kept for as long as
    they stay where they are."""
    first_weight, begins = weights[0], [weight.data_ptr() for weight in weights]
    known: Any = getattr(first_weight, "_fused", None)
    if known is None or known[0] != begins:
        rows, width = 0, first_weight.shape[1]
        for begin, weight in zip(begins, weights, strict=True):
            is_compatible = weight.shape[1] == width and weight.dtype == first_weight.dtype and weight.is_contiguous()
            if not is_compatible or begin != begins[0] + rows * width * weight.itemsize:
                return None
            rows += len(weight)
        known = first_weight._fused = begins, (rows, width)  # type: ignore[attr-defined]
    rows, width = known[1]
    if (first_weight.storage_offset() + rows * width) * first_weight.itemsize > first_weight.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first_weight.as_strided((rows, width), (width, 1))


def _should_pack(x: Tensor, rows: int) -> bool:
    """Is this what a product in oneDNN's layout is faster for?"""
    many_rows = x.dtype == torch.float32 and rows > MAX_TRANSPOSED_ROWS
    return x.is_cpu and (many_rows or x.dtype == torch.bfloat16) and torch.is_inference_mode_enabled()


def _pack_weights(weights: tuple[Tensor, ...], start: int = 0, stop: int | None = None) -> Tensor | None:
    """Rows of the weights, one below another, in oneDNN's layout, made anew when one has changed; None where there is
    none. The first weight keeps it."""
    if any(weight.is_inference() for weight in weights):  # they have no version
        return None
    cache: Any = getattr(weights[0], "_packed", None)
    if cache is None:
        is_bfloat16 = weights[0].dtype == torch.bfloat16
        is_supported = (
            torch.ops.mkldnn._is_mkldnn_bf16_supported() if is_bfloat16 else torch.backends.mkldnn.is_available()
        )
        if not is_supported:
            return None
        cache = _packed_weights[weights[0]] = weights[0]._packed = {}  # type: ignore[attr-defined]
    key = len(weights), start, stop
    tensors, packed_versions, packed_weight = cache.get(key, ((), None, None))
    versions = [
        (weight._version, weight.data_ptr()) for weight in weights
    ]  # `weight.data = other` leaves the version alone
    if packed_versions != versions or any(
        tensor() is not weight for tensor, weight in zip(tensors, weights, strict=True)
    ):
        rows_OI = (torch.cat(weights) if len(weights) > 1 else weights[0]).detach()[start:stop].contiguous()
        packed_numel = sum(
            held.numel() for parts in _packed_weights.values() for *_, held in parts.values() if held is not None
        )
        fits = (packed_numel + rows_OI.numel()) * rows_OI.itemsize <= MAX_PACKED_BYTES
        packed_weight = torch.ops.mkldnn._reorder_linear_weight(rows_OI, 2) if fits else None
        cache[key] = [weakref.ref(weight) for weight in weights], versions, packed_weight
    return packed_weight  # type: ignore[no-any-return]


class PackedLinear(nn.Linear):
    """`nn.Linear` with the faster product; made of one in place by `pack_linears`."""

    def forward(self, input: Tensor) -> Tensor:
        return packed_linear(input, self.weight, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Give every `nn.Linear` inside the faster product, in place, and store the weights of `FUSED_LAYERS` one below
    another. For a module that is loaded for inference; of one in training take `packed_copy`.

    Args:
        module: such as a backbone. Call this when it is on its device and quantised.
    """
    _use_packed_linears(module)
    for part in module.modules():
        for names in FUSED_LAYERS:
            _store_fused([getattr(part, name, None) for name in names])


def packed_copy(module: ModuleT) -> ModuleT:
    """A copy of a module for inference: it has modules of its own, with the faster product, and the tensors of the
    original. The original keeps its classes and where its tensors lie.

    Args:
        module: such as the backbone of a model in training.

    Returns:
        The copy. Its parameters are those of the original, so it always computes with their present values.
    """
    shared_tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    twin = copy.deepcopy(module, shared_tensors)  # type: ignore[arg-type]
    _use_packed_linears(twin)
    return twin


def _use_packed_linears(module: nn.Module) -> None:
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = PackedLinear


FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same, by their names in transformers' decoders."""


def _store_fused(parts: list[nn.Module | None]) -> None:
    """Have the weights of plain layers in float32 on a CPU be parts of one tensor, one below another."""
    layers = [part for part in parts if isinstance(part, PackedLinear) and type(part) is PackedLinear]
    if len(layers) < len(parts) or any(layer.bias is not None for layer in layers):
        return
    weights = [layer.weight for layer in layers]
    if any(weight.dtype != torch.float32 or not weight.is_cpu or weight.is_inference() for weight in weights):
        return
    if _fused_view(weights) is None:
        fused = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, fused.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
