"""Packed rows: documents in groups, a dense mask and FlexAttention attend to the same positions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from unigen.nn.attention import PackedDocuments, packed_mask
from unigen.nn.packed_attention import (
    DocumentGroups,
    FlexDocuments,
    MaskedDocuments,
    document_mask,
    pack_documents,
)

SEGMENTS_BL = torch.tensor([[1] * 50 + [2] * 63 + [3] * 20 + [0] * 7, [1] * 140])
"""Two rows of 140 positions: FlexAttention has blocks of 128."""


def attend_until() -> Tensor:
    """Causal, but for two pictures of 16 positions whose positions see all of theirs."""
    until_BL = torch.arange(140).repeat(2, 1)
    until_BL[0, 60:76], until_BL[1, 120:136] = 75, 135
    return until_BL


UNTIL = pytest.mark.parametrize("until", [None, attend_until()], ids=["causal", "pictures"])


def attend(packing: PackedDocuments, key_heads: int = 4, width: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    query_BHLE = torch.randn(2, 4, 140, width, generator=rng)
    key_BKLE, value_BKLE = torch.randn(2, 2, key_heads, 140, width, generator=rng)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        output_BLHE = packing.attend(query_BHLE, key_BKLE, value_BKLE, None, 0.0)
    return output_BLHE[SEGMENTS_BL > 0]


@UNTIL
def test_the_mask_function_is_the_mask(until: Tensor | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask_B1LL = packed_mask(SEGMENTS_BL, until)
    assert torch.equal(create_mask(document_mask(SEGMENTS_BL, until), 2, None, 140, 140, "cpu"), mask_B1LL)
    other = document_mask(SEGMENTS_BL.clamp(max=1), until)  # the control: documents that see each other
    assert not torch.equal(create_mask(other, 2, None, 140, 140, "cpu"), mask_B1LL)


@UNTIL
@pytest.mark.parametrize(("key_heads", "width"), [(4, 16), (2, 8)], ids=["16 wide", "grouped, 8 wide"])
def test_all_ways_are_the_same_attention(until: Tensor | None, key_heads: int, width: int) -> None:
    grouped = attend(DocumentGroups(SEGMENTS_BL, until), key_heads, width)
    for other in (MaskedDocuments, FlexDocuments):
        torch.testing.assert_close(attend(other(SEGMENTS_BL, until), key_heads, width), grouped, atol=2e-5, rtol=1e-4)
    leaking = attend(FlexDocuments(SEGMENTS_BL.clamp(max=1), until), key_heads, width)
    assert not torch.allclose(leaking, grouped, atol=1e-2)


def test_dropout_falls_back_to_the_dense_mask() -> None:
    """FlexAttention has none, and would leave it out without a word."""
    query = torch.randn(2, 4, 140, 16)
    found = []
    for kind in (FlexDocuments, MaskedDocuments):
        torch.manual_seed(0)
        found.append(kind(SEGMENTS_BL).attend(query, query, query, None, 0.5))
    assert torch.equal(*found)


def test_what_a_gpu_attends_with_is_made_without_the_host() -> None:
    """A meta tensor has no values: whatever copies them to the host stops."""
    segments_BL, until_BL = SEGMENTS_BL.to("meta"), attend_until().to("meta")
    assert MaskedDocuments(segments_BL, until_BL).mask_B1LL.shape == (2, 1, 140, 140)
    assert FlexDocuments(segments_BL, until_BL).block_mask.shape == (2, 1, 140, 140)
    with pytest.raises((RuntimeError, NotImplementedError)):
        DocumentGroups(segments_BL, until_BL)


def test_a_cpu_attends_in_groups() -> None:
    assert isinstance(pack_documents(SEGMENTS_BL), DocumentGroups)
