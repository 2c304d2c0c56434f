"""Attention inside the documents of packed rows: `pack_documents` prepares a batch once, every layer calls `attend`.

On a CPU documents of like length are attended to together (`DocumentGroups`). On a GPU training uses FlexAttention
(Dong et al. 2024, arXiv 2412.05496), whose block mask is made on the device (`FlexDocuments`); a forward pass without
gradients, as in scoring, uses torch's own attention with a dense mask, which compiles nothing (`MaskedDocuments`).
Neither copies to the host.

Shapes: B rows, L positions, H query heads, K key heads, E head width, N documents of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from unigen.nn.attention import PackedDocuments, masked_attention, packed_mask
from unigen.nn.cpu.attention import explicit_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MIN_FLEX_WIDTH = 16
"""Narrower heads are padded with zeros: FlexAttention's kernels take no less."""


def pack_documents(segments_BL: Tensor, attend_until_BL: Tensor | None = None) -> PackedDocuments:
    """Prepare attention for a batch of packed rows.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding.
        attend_until_BL: the last position of its row that each position attends to; None is causal.

    Returns:
        The prepared documents, used by all layers.
    """
    if not segments_BL.is_cuda:
        return DocumentGroups(segments_BL, attend_until_BL)
    if torch.is_grad_enabled():
        return FlexDocuments(segments_BL, attend_until_BL)
    return MaskedDocuments(segments_BL, attend_until_BL)


class DocumentGroups:
    """The documents of packed rows in groups of like length, so that attention costs the sum of their squares.

    A mask over whole rows computes B L^2 scores and discards most of them: with documents of 90 positions in rows of
    640 that is seven times the work. A group's shorter documents are padded at their end with copies of their last
    position, to which no real query attends. Padding attends to nothing and gives zeros.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding.
        attend_until_BL: the last position of its row that each position attends to; None is causal.
        max_padding: the fraction of a group's longest document by which others may be shorter.
    """

    groups: list[tuple[int, int, Tensor | None]]
    """Of each group the number N of documents, their length L, and a mask (N, 1, L, L), True where a query may not see
    a key; None is causal."""
    gather_index: Tensor
    """Indices (P,) into the flattened rows of the positions of the groups, group after group."""
    scatter_index: Tensor
    """Indices (B L,) into those P of the positions of the rows; P, one beyond the last, for padding."""

    def __init__(self, segments_BL: Tensor, attend_until_BL: Tensor | None = None, max_padding: float = 0.15) -> None:
        rows, length = segments_BL.shape
        device = segments_BL.device
        flat_segments = (segments_BL + torch.arange(rows, device=device)[:, None] * (length + 1)).flatten().cpu()
        _, counts = torch.unique_consecutive(flat_segments, return_counts=True)
        starts = counts.cumsum(0) - counts
        is_document = segments_BL.flatten().cpu()[starts] > 0
        documents = sorted(zip(counts[is_document].tolist(), starts[is_document].tolist(), strict=True), reverse=True)
        attend_until = None
        if attend_until_BL is not None:
            attend_until = (attend_until_BL.cpu() + torch.arange(rows)[:, None] * length).flatten()
        self.groups = []
        indices, scatter_index, offset = [], torch.full((rows * length,), -1), 0
        while documents:
            longest = documents[0][0]
            group = [d for d in documents if d[0] >= (1 - max_padding) * longest]
            documents = documents[len(group) :]
            sizes, begins = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
            within = torch.arange(longest)
            index_NL = begins + torch.minimum(within, sizes - 1)
            hidden = None
            if attend_until is not None:
                until_NL = attend_until[index_NL] - begins
                if not torch.equal(until_NL, torch.minimum(within, sizes - 1)):
                    hidden = (within > until_NL[:, :, None])[:, None].to(device)
            is_real = (within < sizes).flatten()
            indices.append(index_NL.flatten())
            scatter_index[indices[-1][is_real]] = offset + is_real.nonzero()[:, 0]
            offset += len(is_real)
            self.groups.append((len(group), longest, hidden))
        self.gather_index = torch.cat(indices or [scatter_index[:0]]).to(device)
        self.scatter_index = torch.where(scatter_index < 0, offset, scatter_index).to(device)

    def attend(
        self, query_BHLE: Tensor, key_BKLE: Tensor, value_BKLE: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attention output (B, L, H, E)."""
        batch, heads, length, width = query_BHLE.shape
        grouped_heads = key_BKLE.shape[1] != heads
        sizes = [count * longest for count, longest, _ in self.groups]
        parts = [
            x.transpose(1, 2).flatten(0, 1).index_select(0, self.gather_index).split(sizes)
            for x in (query_BHLE, key_BKLE, value_BKLE)
        ]
        output = []
        for (count, longest, hidden_N1LL), *qkv in zip(self.groups, *parts, strict=True):
            q, k, v = (x.unflatten(0, (count, longest)).transpose(1, 2) for x in qkv)
            if query_BHLE.is_cpu and not grouped_heads:
                output_NHLE = explicit_attention(q, k, v, hidden_N1LL, scaling or width**-0.5, dropout)
            else:
                mask_arguments = {"is_causal": True} if hidden_N1LL is None else {"attn_mask": ~hidden_N1LL}
                output_NHLE = scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped_heads, **mask_arguments
                )
            output.append(output_NHLE.transpose(1, 2).flatten(0, 1))
        output.append(query_BHLE.new_zeros(1, heads, width))  # the output at padding
        return torch.cat(output).index_select(0, self.scatter_index).unflatten(0, (batch, length))


class MaskedDocuments:
    """Packed rows with one mask over whole rows. Padding attends only to itself.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding.
        attend_until_BL: the last position of its row that each position attends to; None is causal.
    """

    def __init__(self, segments_BL: Tensor, attend_until_BL: Tensor | None = None) -> None:
        self.mask_B1LL = packed_mask(segments_BL, attend_until_BL)

    def attend(
        self, query_BHLE: Tensor, key_BKLE: Tensor, value_BKLE: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attention output (B, L, H, E)."""
        return masked_attention(query_BHLE, key_BKLE, value_BKLE, self.mask_B1LL, scaling, dropout)


class FlexDocuments:
    """Packed rows with FlexAttention, which computes only blocks in which a query attends to a key. Padding attends
    only to itself. FlexAttention has no dropout of attention weights: with dropout `MaskedDocuments` is used.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding.
        attend_until_BL: the last position of its row that each position attends to; None is causal.
    """

    def __init__(self, segments_BL: Tensor, attend_until_BL: Tensor | None = None) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        self.segments_BL, self.attend_until_BL = segments_BL, attend_until_BL
        rows, length = segments_BL.shape
        mask_function = document_mask(segments_BL, attend_until_BL)
        self.block_mask: BlockMask = create_block_mask(
            mask_function, rows, None, length, length, device=segments_BL.device
        )

    def attend(
        self, query_BHLE: Tensor, key_BKLE: Tensor, value_BKLE: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attention output (B, L, H, E)."""
        if dropout:
            dense = MaskedDocuments(self.segments_BL, self.attend_until_BL)
            return dense.attend(query_BHLE, key_BKLE, value_BKLE, scaling, dropout)
        width, grouped_heads = query_BHLE.shape[-1], key_BKLE.shape[1] != query_BHLE.shape[1]
        missing = max(0, MIN_FLEX_WIDTH - width)
        q, k, v = (pad(x, (0, missing)) if missing else x for x in (query_BHLE, key_BKLE, value_BKLE))
        output_BHLE = _flex_attention(q.is_cuda)(
            q, k, v, block_mask=self.block_mask, scale=scaling or width**-0.5, enable_gqa=grouped_heads
        )
        return output_BHLE[..., :width].transpose(1, 2).contiguous()


def document_mask(
    segments_BL: Tensor, attend_until_BL: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask of `packed_mask` as a function, as FlexAttention takes it.

    Args:
        segments_BL: the document of each position, from 1; 0 is padding.
        attend_until_BL: the last position of its row that each position attends to; None is causal.

    Returns:
        A function (row, head, query, key) -> bool, True where the query attends to the key.
    """
    if attend_until_BL is None:
        attend_until_BL = torch.arange(segments_BL.shape[1], device=segments_BL.device).expand_as(segments_BL)

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segments_BL[row, query]
        in_document = (segment == segments_BL[row, key]) & (key <= attend_until_BL[row, query])
        return torch.where(segment == 0, query == key, in_document)

    return is_visible


def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention, compiled by itself unless a graph around it is being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if compiled and not torch.compiler.is_compiling():
        return _compiled_flex_attention()
    return cast(Callable[..., Tensor], flex_attention)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
