"""Matrix products of a decoding step on a CPU: a few rows are multiplied with every weight once.

Such a step is bound by reading the weights. Their layout in memory and the order of the product decide how fast they
are read (`python scripts/bench.py decode` and `families` print it).

oneDNN's layout of the weights is read faster than their own. It is a second copy of them, so only the first
`MAX_PACKED_BYTES` of a process have it. In bfloat16 the result is `nn.Linear`'s bit for bit, in float32 it differs by
rounding. A few rows of float32 (`MAX_TRANSPOSED_ROWS`) are faster still by `W x^T`, for which no second copy is made:
the weights of layers with the same input are moved next to each other in memory.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    _PackedKey: TypeAlias = tuple[int, int, int | None]
    _PackedRows: TypeAlias = tuple[Sequence[weakref.ref[Tensor]], list[tuple[int, int]] | None, Tensor | None]

MAX_TRANSPOSED_ROWS = 3 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
"""Rows up to which `W x^T` is faster in float32 than `x W^T` and than oneDNN's layout."""
MAX_PACKED_BYTES = 4 << 30
"""Bytes of weights that are stored in oneDNN's layout as well."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_packed_weights = WeakIdKeyDictionary()
"""Packed weights, by weight and then by (number of weights joined, start, stop). A value holds the tensors that were
packed, of each its version and its address, and the packed rows (None beyond `MAX_PACKED_BYTES`). Each weight has its
own part as an attribute too, which is found faster."""


def packed_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """`linear(x, weight[start:stop], bias[start:stop])`, by the fastest product for this input.

    Args:
        x: input (..., I), any number of rows.
        weight_OI: weight.
        bias_O: bias; None is none.
        start: first output.
        stop: the output after the last; None is O.

    Returns:
        The output (..., stop - start).
    """
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
    """Outputs of several linear layers with the same input.

    Where the layers allow it, they are one product, which is faster than several small ones and gives the same up to
    rounding in float32: for few rows where `pack_linears` has stored their weights as one tensor, for more rows in
    oneDNN's layout.

    Args:
        x: input (..., I) of all layers.
        *groups: groups of layers.

    Returns:
        Of each group the outputs of its layers, joined along the last dimension.
    """
    layers = [layer for group in groups for layer in group]
    plain = [layer._parameters for layer in layers if type(layer) is PackedLinear]
    if x.is_cpu and len(plain) == len(layers) and not any([params["bias"] is not None for params in plain]):
        weights, rows = [params["weight"] for params in plain], x.numel() // x.shape[-1]
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
    """The weights as one tensor, where each begins in memory where the one before it ends; else None. The result of the
    check is cached until a weight moves."""
    first_weight, begins = weights[0], [weight.data_ptr() for weight in weights]
    cached_view: tuple[list[int], tuple[int, int]] | None = getattr(first_weight, "_fused", None)
    if cached_view is None or cached_view[0] != begins:
        rows, width = 0, first_weight.shape[1]
        for begin, weight in zip(begins, weights, strict=True):
            is_compatible = weight.shape[1] == width and weight.dtype == first_weight.dtype and weight.is_contiguous()
            if not is_compatible or begin != begins[0] + rows * width * weight.itemsize:
                return None
            rows += len(weight)
        cached_view = first_weight._fused = begins, (rows, width)  # type: ignore[attr-defined]
    rows, width = cached_view[1]
    if (first_weight.storage_offset() + rows * width) * first_weight.itemsize > first_weight.untyped_storage().nbytes():
        return None  # adjacent by chance: another storage
    return first_weight.as_strided((rows, width), (width, 1))


def _should_pack(x: Tensor, rows: int) -> bool:
    """Whether a product in oneDNN's layout is faster for this input."""
    many_rows = x.dtype == torch.float32 and rows > MAX_TRANSPOSED_ROWS
    return x.is_cpu and (many_rows or x.dtype == torch.bfloat16) and torch.is_inference_mode_enabled()


def _pack_weights(weights: tuple[Tensor, ...], start: int = 0, stop: int | None = None) -> Tensor | None:
    """The rows of the weights, joined, in oneDNN's layout; None where that is not possible. They are packed again when
    a weight has changed. The first weight stores them."""
    if any(weight.is_inference() for weight in weights):  # they have no version
        return None
    cache: dict[_PackedKey, _PackedRows] | None = getattr(weights[0], "_packed", None)
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
            packed.numel() for parts in _packed_weights.values() for *_, packed in parts.values() if packed is not None
        )
        fits = (packed_numel + rows_OI.numel()) * rows_OI.itemsize <= MAX_PACKED_BYTES
        packed_weight = torch.ops.mkldnn._reorder_linear_weight(rows_OI, 2) if fits else None
        cache[key] = [weakref.ref(weight) for weight in weights], versions, packed_weight
    return packed_weight  # type: ignore[no-any-return]


class PackedLinear(nn.Linear):
    """`nn.Linear` with the product of `packed_linear`. `pack_linears` and `packed_copy` make it of an `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """The output (..., O) of an input (..., I)."""
        return packed_linear(input, self.weight, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Make every `nn.Linear` of a module a `PackedLinear`, in place, and store the weights of `FUSED_LAYERS` as one
    tensor. It is for a module that is loaded for inference; for one in training use `packed_copy`.

    Args:
        module: such as a backbone, already on its device and quantised.
    """
    _use_packed_linears(module)
    for part in module.modules():
        for names in FUSED_LAYERS:
            _store_fused([getattr(part, name, None) for name in names])


def packed_copy(module: ModuleT) -> ModuleT:
    """A copy of a module for inference: its layers are new `PackedLinear` modules with the tensors of the original. The
    original keeps its classes, and its tensors their addresses.

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
"""Layers with the same input, by their names in transformers' decoders."""


def _store_fused(parts: list[nn.Module | None]) -> None:
    """Store the weights of plain float32 layers on a CPU as parts of one tensor."""
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
