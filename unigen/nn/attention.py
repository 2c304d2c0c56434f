"""Attention masks from positions alone, and the attention function that transformers' models call.

A query attends to every earlier position, and those after it up to `attend_until`: itself in text (causal), the last
position of the image where an image is generated as a whole, the last of its scale in next-scale prediction.

Shapes: B rows, Q queries, L positions, H query heads, K key heads, E head width. A mask is bool (B, 1, Q, L), True
where query q may see key l.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from unigen.nn.cpu.attention import single_query_attention


def packed_mask(segments_BL: Tensor, attend_until_BL: Tensor | None = None) -> Tensor:
    """The mask of packed rows: each position attends to its own document up to `attend_until`, and no other document.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding, which attends only to itself.
        attend_until_BL: the last position of its row that each position attends to; None is causal.

    Returns:
        A mask (B, 1, L, L).
    """
    positions_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    attend_until_BL = positions_L.expand_as(segments_BL) if attend_until_BL is None else attend_until_BL
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    padding_BL1 = (segments_BL == 0)[:, :, None]
    diagonal_LL = positions_L[:, None] == positions_L
    return torch.where(padding_BL1, diagonal_LL, same_BLL & (positions_L <= attend_until_BL[:, :, None]))[:, None]


def cached_mask(lengths_B: Tensor, queries: int, keys: int, attend_until_BQ: Tensor | None = None) -> Tensor:
    """The mask of one step with a cache: query q of row b stands at lengths[b] + q.

    Args:
        lengths_B: int64 on the CPU, the cached positions of each row before this step.
        queries: positions of the step.
        keys: the length of the cache as it is read.
        attend_until_BQ: the last of the step's positions that each query attends to; None is up to itself.

    Returns:
        A mask (B, 1, Q, keys) on the CPU.
    """
    last_key_BQ = lengths_B[:, None] + (torch.arange(queries) if attend_until_BQ is None else attend_until_BQ)
    return (torch.arange(keys) <= last_key_BQ[:, :, None])[:, None]


class PackedDocuments(Protocol):
    """The documents of packed rows, prepared once a batch (`unigen.nn.packed_attention.pack_documents`)."""

    def attend(
        self, query_BHLE: Tensor, key_BKLE: Tensor, value_BKLE: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attend inside each document.

        Args:
            query_BHLE: queries.
            key_BKLE: keys.
            value_BKLE: values.
            scaling: factor of the scores; None is E^-0.5.
            dropout: probability in [0, 1) with which an attention weight is dropped.

        Returns:
            The attention output (B, L, H, E).
        """


def attention_forward(
    module: torch.nn.Module,
    query_BHLE: Tensor,
    key_BKLE: Tensor,
    value_BKLE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: PackedDocuments | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """A `transformers` attention function.

    Args:
        module: the layer, as transformers gives it; not used.
        query_BHLE: queries.
        key_BKLE: keys. Those of a cache may be in another precision, in which queries then meet them.
        value_BKLE: values, in the precision of the keys.
        attention_mask: additive or bool (B, 1, L, keys); None is causal.
        scaling: factor of the scores; None is E^-0.5.
        dropout: probability in [0, 1) with which an attention weight is dropped.
        packing: the documents of packed rows, read without a cache; then the mask is not read.
        **kwargs: other arguments that transformers passes; not used.

    Returns:
        The output (B, L, H, E) and None, where transformers may give attention weights.
    """
    if query_BHLE.dtype != key_BKLE.dtype:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(key_BKLE.dtype)
        query = query_BHLE.to(key_BKLE.dtype)
        output_BLHE, _ = attention_forward(
            module, query, key_BKLE, value_BKLE, attention_mask, scaling, dropout, packing, **kwargs
        )
        return output_BLHE.to(query_BHLE.dtype), None
    if packing is not None:
        return packing.attend(query_BHLE, key_BKLE, value_BKLE, scaling, dropout), None
    is_single_query = query_BHLE.is_cpu and query_BHLE.shape[2] == 1 and query_BHLE.shape[1] == key_BKLE.shape[1]
    if is_single_query and (attention_mask is None or attention_mask.is_floating_point()):
        scale = query_BHLE.shape[-1] ** -0.5 if scaling is None else scaling
        return single_query_attention(query_BHLE, key_BKLE, value_BKLE, attention_mask, scale), None
    return masked_attention(query_BHLE, key_BKLE, value_BKLE, attention_mask, scaling, dropout), None


def masked_attention(
    query_BHLE: Tensor,
    key_BKLE: Tensor,
    value_BKLE: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by torch's `scaled_dot_product_attention`.

    Args:
        query_BHLE: queries.
        key_BKLE: keys, in groups where there are fewer key heads than query heads.
        value_BKLE: values.
        mask: additive or bool, True where a key may be seen; None is causal.
        scaling: factor of the scores; None is E^-0.5.
        dropout: probability in [0, 1) with which an attention weight is dropped.

    Returns:
        The output (B, L, H, E).
    """
    groups = query_BHLE.shape[1] // key_BKLE.shape[1]
    if groups > 1 and mask is not None:  # a GPU's fused kernels take a mask or groups of heads
        key_BKLE, value_BKLE = (x.repeat_interleave(groups, 1) for x in (key_BKLE, value_BKLE))
    output_BHLE = scaled_dot_product_attention(
        query_BHLE,
        key_BKLE,
        value_BKLE,
        mask,
        dropout_p=dropout,
        is_causal=mask is None and query_BHLE.shape[2] > 1,
        scale=scaling,
        enable_gqa=key_BKLE.shape[1] != query_BHLE.shape[1],
    )
    return output_BHLE.transpose(1, 2).contiguous()


@contextmanager
def math_attention(device: torch.device) -> Iterator[None]:
    """Use torch's math backend of attention on a CPU: plain products and a softmax.

    It is for networks of other libraries; our own call `unigen.nn.cpu.attention.explicit_attention`. The fused kernel's
    backward pass is slow for few positions. On a GPU nothing changes.

    Args:
        device: the device on which the network runs.
    """
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
    """Register `attention_forward` with transformers.

    Args:
        compiled: whether the decoder is compiled. Attention is then left out of the graphs of torch.compile: its shapes
            change from batch to batch on a CPU, and on a GPU FlexAttention is a graph of its own.

    Returns:
        The name to give as `attn_implementation`.
    """
    from transformers import AttentionInterface

    name = "unigen_packed_hole" if compiled else "unigen_packed"
    AttentionInterface.register(name, torch.compiler.disable(attention_forward) if compiled else attention_forward)
    return name
