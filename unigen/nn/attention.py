"""Who may look at whom, from what positions are, never from what a model is: masks, and packed attention.

A query sees every earlier position, and those after it up to its reach: itself in text (causal), the last position of
the image where all of an image is written at once, the last of its scale in next-scale prediction. One number a
position says all three.

Shapes: B rows, Q queries, L positions, H heads, E head width, N documents. A mask is bool (B, 1, Q, L), True where
query q may look at key l.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def packed_mask(segments_BL: Tensor, reach_BL: Tensor | None = None) -> Tensor:
    """Inside each packed document up to the reach (in positions of the row; None is causal), nothing across documents;
    padding (segment 0) looks only at itself."""
    positions_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    reach_BL = positions_L.expand_as(segments_BL) if reach_BL is None else reach_BL
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    padding_BL1 = (segments_BL == 0)[:, :, None]
    diagonal_LL = positions_L[:, None] == positions_L
    return torch.where(padding_BL1, diagonal_LL, same_BLL & (positions_L <= reach_BL[:, :, None]))[:, None]


def cached_mask(lengths_B: Tensor, queries: int, keys: int, reach_BQ: Tensor | None = None) -> Tensor:
    """Query q of row b stands at lengths[b] + q and sees every key up to lengths[b] + reach[b, q] (None: up to itself).

    lengths_B: int64 on the CPU, cached positions of each row before this step. keys: the length of the cache as read.
    """
    last_key_BQ = lengths_B[:, None] + (torch.arange(queries) if reach_BQ is None else reach_BQ)
    return (torch.arange(keys) <= last_key_BQ[:, :, None])[:, None]


class PackedGroups:
    """The documents of packed rows in groups of like length, so that attention costs the sum of their squares.

    A mask over whole rows computes B L^2 scores and throws most away: with documents of 90 positions in rows of 640
    that is seven times the work. places (P,): where in the flattened rows each position of the groups is, group after
    group; a group's shorter documents are filled up with their last position. back (B L,): where each position of the
    rows is among those, P (one beyond) for padding. groups: (documents, length, what is hidden (N, 1, length, length),
    or None where all are causal).
    """

    def __init__(self, segments_BL: Tensor, reach_BL: Tensor | None = None, waste: float = 0.15) -> None:
        rows, length = segments_BL.shape
        device = segments_BL.device
        flat_segments = (segments_BL + torch.arange(rows, device=device)[:, None] * (length + 1)).flatten().cpu()
        _, counts = torch.unique_consecutive(flat_segments, return_counts=True)
        starts = counts.cumsum(0) - counts
        is_document = segments_BL.flatten().cpu()[starts] > 0
        documents = sorted(zip(counts[is_document].tolist(), starts[is_document].tolist(), strict=True), reverse=True)
        reach = None if reach_BL is None else (reach_BL.cpu() + torch.arange(rows)[:, None] * length).flatten()
        self.groups: list[tuple[int, int, Tensor | None]] = []
        places, back, offset = [], torch.full((rows * length,), -1), 0
        while documents:
            longest = documents[0][0]
            group = [d for d in documents if d[0] >= (1 - waste) * longest]
            documents = documents[len(group) :]
            sizes, begins = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
            within = torch.arange(longest)
            places_NL = begins + torch.minimum(within, sizes - 1)
            masked = None
            if reach is not None:
                reach_NL = reach[places_NL] - begins
                if not torch.equal(reach_NL, torch.minimum(within, sizes - 1)):
                    masked = (within > reach_NL[:, :, None])[:, None].to(device)
            is_real = (within < sizes).flatten()
            places.append(places_NL.flatten())
            back[places[-1][is_real]] = offset + is_real.nonzero()[:, 0]
            offset += len(is_real)
            self.groups.append((len(group), longest, masked))
        self.places = torch.cat(places or [back[:0]]).to(device)
        self.scatter_index = torch.where(back < 0, offset, back).to(device)


def packed_attention(
    module: Any,
    query_BHLE: Tensor,
    key_BHLE: Tensor,
    value_BHLE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: PackedGroups | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A `transformers` attention function: inside each document of `packing`, else as `attention_mask` says.

    Padding attends to nothing and gives zeros. A group's shorter documents are filled up at their end, beyond the reach
    of every real query. Keys of a cache in another precision than the query's are met in theirs.
    """
    if query_BHLE.dtype != key_BHLE.dtype:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(key_BHLE.dtype)
        query = query_BHLE.to(key_BHLE.dtype)
        output_BLHE, _ = packed_attention(
            module, query, key_BHLE, value_BHLE, attention_mask, scaling, dropout, packing, **kwargs
        )
        return output_BLHE.to(query_BHLE.dtype), None
    is_single_query = query_BHLE.is_cpu and query_BHLE.shape[2] == 1 and query_BHLE.shape[1] == key_BHLE.shape[1]
    if packing is None and is_single_query and (attention_mask is None or attention_mask.is_floating_point()):
        scale = query_BHLE.shape[-1] ** -0.5 if scaling is None else scaling
        return _single_query_attention(query_BHLE, key_BHLE, value_BHLE, attention_mask, scale), None
    if packing is None:
        groups = query_BHLE.shape[1] // key_BHLE.shape[1]
        if groups > 1 and attention_mask is not None:  # a GPU's fused kernels take a mask or groups of heads
            key_BHLE, value_BHLE = (x.repeat_interleave(groups, 1) for x in (key_BHLE, value_BHLE))
        output_BHLE = scaled_dot_product_attention(
            query_BHLE,
            key_BHLE,
            value_BHLE,
            attention_mask,
            dropout_p=dropout,
            is_causal=attention_mask is None and query_BHLE.shape[2] > 1,
            scale=scaling,
            enable_gqa=key_BHLE.shape[1] != query_BHLE.shape[1],
        )
        return output_BHLE.transpose(1, 2).contiguous(), None
    batch, heads, length, width = query_BHLE.shape
    grouped = key_BHLE.shape[1] != heads
    sizes = [count * longest for count, longest, _ in packing.groups]
    parts = [
        x.transpose(1, 2).flatten(0, 1).index_select(0, packing.places).split(sizes)
        for x in (query_BHLE, key_BHLE, value_BHLE)
    ]
    output = []
    for (count, longest, masked_N1LL), *qkv in zip(packing.groups, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, longest)).transpose(1, 2) for x in qkv)
        if query_BHLE.device.type == "cpu" and not grouped:
            output_NHLE = _explicit_attention(q, k, v, masked_N1LL, scaling or width**-0.5, dropout)
        else:
            mask_arguments = {"is_causal": True} if masked_N1LL is None else {"attn_mask": ~masked_N1LL}
            output_NHLE = scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **mask_arguments
            )
        output.append(output_NHLE.transpose(1, 2).flatten(0, 1))
    output.append(query_BHLE.new_zeros(1, heads, width))  # what padding reads
    return torch.cat(output).index_select(0, packing.scatter_index).unflatten(0, (batch, length)), None


def _single_query_attention(
    q_BH1E: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask_B11L: Tensor | None, scale: float
) -> Tensor:
    """softmax(q k^T scale + mask) v, as (B, 1, H, E): on a CPU a step of one query is bound by the number of
    operations, and torch's own attention takes a dozen small ones, among them a product over all keys."""
    rows, heads = q_BH1E.shape[:2]
    scores_N1L = torch.bmm((q_BH1E * scale).flatten(0, 1), k_BHLE.flatten(0, 1).transpose(1, 2))
    if mask_B11L is not None:
        scores_N1L.unflatten(0, (rows, heads)).add_(mask_B11L)
    output_N1E = torch.bmm(scores_N1L.softmax(-1), v_BHLE.flatten(0, 1))
    return output_N1E.view(rows, 1, heads, -1)


def _explicit_attention(
    q_NHLE: Tensor, k_NHLE: Tensor, v_NHLE: Tensor, hidden: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """softmax(q k^T scale) v, causal where nothing else is said: on a CPU faster, forward and backward in bf16, than
    the fused kernel for documents of 90 to 350 positions."""
    if hidden is None:
        length = q_NHLE.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q_NHLE.device).triu(1)
    scores_NHLL = (q_NHLE @ k_NHLE.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    weights_NHLL = torch.nn.functional.dropout(scores_NHLL.softmax(-1), dropout)
    return weights_NHLL.to(v_NHLE.dtype) @ v_NHLE


@contextmanager
def math_attention(device: torch.device) -> Iterator[None]:
    """Inside, torch's own attention on a CPU is products and a softmax, as in `_explicit_attention`, for networks that
    are not
    ours: the fused kernel's backward pass is slow for as few positions. A GPU is left alone."""
    if device.type != "cpu":
        yield
        return
    flag = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # of all devices, whatever its name
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else bf16 is computed in fp32
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(flag)


def register_attention(compiled: bool = False) -> str:
    """Make `packed_attention` known to transformers; returns the name to give as `attn_implementation`. compiled: as a
    hole in graphs of torch.compile, since its shapes change from batch to batch."""
    from transformers import AttentionInterface

    name = "unigen_packed_hole" if compiled else "unigen_packed"
    AttentionInterface.register(name, torch.compiler.disable(packed_attention) if compiled else packed_attention)
    return name
