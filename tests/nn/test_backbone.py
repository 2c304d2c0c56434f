"""Cached steps equal the full forward; packed attention equals the mask; any decoder-only model serves."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PhiConfig, Qwen3Config

from unigen.nn.attention import packed_mask
from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache
from unigen.nn.packed_attention import DocumentGroups

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, pad_token_id=0),
    "phi": PhiConfig(**SMALL, pad_token_id=0),
}


def backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[name])
    for p in lm.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    return Backbone(lm).eval()


def causal(backbone: Backbone, ids_BL: torch.Tensor) -> torch.Tensor:
    positions_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
    mask = packed_mask(torch.ones_like(ids_BL))
    return backbone.forward_cached(backbone.embed(ids_BL), positions_BL, mask)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_mixed_lengths_in_the_cache_equal_the_full_forward(name: str) -> None:
    model = backbone(name)
    ids_BL = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    full = causal(model, ids_BL)
    cache = SlotCache(2, 3, torch.device("cpu"))
    at = [0, 0, 0]
    # prefill of different lengths, then a row that rests, then a step in which part of what was read is rolled back
    for rows, counts, kept in (
        ([0, 1, 2], [5, 3, 1], None),
        ([0, 2], [1, 4], None),
        ([0, 1, 2], [2, 2, 2], 1),
        ([1, 2], [1, 1], None),
    ):
        longest = max(counts)
        step = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            step[i, :count] = ids_BL[row, at[row] : at[row] + count]
        positions, mask = cache.begin_step(rows, longest)
        hidden = model.forward_cached(model.embed(step), positions, mask, cache)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            torch.testing.assert_close(hidden[i, :count], full[row, at[row] : at[row] + count], atol=2e-5, rtol=1e-4)
            at[row] += kept or count
        cache.commit(rows, [kept or count for count in counts])


def segments() -> torch.Tensor:
    return torch.tensor([[1] * 5 + [2] * 7 + [3] * 2 + [0] * 2, [1] * 16])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_attention_equals_the_mask(name: str) -> None:
    model = backbone(name)
    segments_BL = segments()
    ids_BL = torch.randint(1, 64, segments_BL.shape, generator=torch.Generator().manual_seed(2))
    positions_BL = torch.cat(
        [torch.cat([torch.arange(5), torch.arange(7), torch.arange(2), torch.arange(2)])[None], torch.arange(16)[None]]
    )
    real = segments_BL > 0

    def run(kind: str, marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        embeds = model.embed(ids_BL)
        if kind == "packed":
            hidden = model.forward_packed(embeds, positions_BL, marks)
        else:
            hidden = model.forward_cached(embeds, positions_BL, packed_mask(marks))
        hidden[real].square().sum().backward()
        weight = next(p for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "c_attn.weight")))
        return hidden[real], weight.grad.clone()

    packed, masked = run("packed", segments_BL), run("mask", segments_BL)
    torch.testing.assert_close(packed[0], masked[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(packed[1], masked[1], atol=1e-3, rtol=1e-3)
    leaking = run("packed", segments_BL.clamp(max=1))
    assert not torch.allclose(leaking[0], packed[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_training_is_the_same_training() -> None:
    def run(compiled: bool, marks: torch.Tensor) -> list[torch.Tensor]:
        model = backbone("llama").train()
        if compiled:
            model.compile_packed()
        positions_BL = torch.arange(16).expand(2, 16)
        for shift in (3, 0):  # documents of other lengths meet the same graphs
            model.zero_grad()
            hidden = model.forward_packed(model.embed(positions_BL), positions_BL, marks.roll(shift, 1))
            hidden[marks.roll(shift, 1) > 0].square().sum().backward()
        return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, compiled = run(False, segments()), run(True, segments())
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(run(True, segments().clamp(max=1))[0], plain[0], atol=1e-3)


def test_groups_hold_each_real_position_once() -> None:
    packing, real = DocumentGroups(segments()), segments().flatten() > 0
    assert packing.gather_index[packing.scatter_index[real]].tolist() == real.nonzero().flatten().tolist()
    assert set(packing.scatter_index[~real].tolist()) == {len(packing.gather_index)}


@torch.no_grad()
def test_a_slice_of_the_head_is_a_slice_of_the_logits() -> None:
    model = backbone("phi")  # a head with a bias
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(model.logits(hidden, 40, 60), model.lm.get_output_embeddings()(hidden)[:, 40:60])


def test_models_with_learnt_absolute_positions_take_ours() -> None:
    lm = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))
    model = Backbone(lm).eval()
    with torch.no_grad():
        hidden = causal(model, torch.arange(1, 9)[None])
    assert hidden.shape == (1, 8, 32)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_mask_is_made_once_in_the_precision_of_the_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(name).to(torch.bfloat16)
    cache, ids_BL = model.new_cache(1, torch.device("cpu")), torch.arange(1, 6)[None]
    positions_BL, mask = cache.begin_step([0], 5)
    cast: list[torch.dtype] = []
    into = torch.Tensor.to

    def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = into(x, *args, **kwargs)
        cast.extend([x.dtype] if x.shape == mask.shape and made.dtype != x.dtype else [])
        return made

    monkeypatch.setattr(torch.Tensor, "to", watched)
    model.forward_cached(model.embed(ids_BL), positions_BL, mask, cache)
    assert cache.layers[0].keys.dtype == torch.float32 and cast == []
