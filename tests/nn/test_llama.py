"""Llama blocks read straight through equal `transformers`' own, step by step, whatever the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from unigen.hub.resolve import read_json
from unigen.hub.weights import load_strict
from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache
from unigen.nn.cpu import llama

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped keys": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head width": {"head_dim": 16},
    "scaled positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_equals_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **KINDS[kind], pad_token_id=0))
    for p in lm.parameters():
        torch.nn.init.normal_(p, 0.0, 0.2)
    backbone = Backbone(lm).eval()
    assert llama.is_plain_llama(lm.model)
    ids_BL = torch.randint(1, 64, (2, 9))

    def steps() -> list[torch.Tensor]:
        cache, outputs = SlotCache(2, 2, torch.device("cpu")), []
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            positions_BL, mask = cache.begin_step([0, 1], stop - start)
            outputs.append(backbone.forward_cached(backbone.embed(ids_BL[:, start:stop]), positions_BL, mask, cache))
            cache.commit([0, 1], [stop - start] * 2)
        return outputs

    ours = torch.cat(steps(), 1)
    monkeypatch.setattr(llama, "is_plain_llama", lambda decoder: False)
    theirs = torch.cat(steps(), 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scaled positions"])
@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_our_modules_are_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    """The same parameters, states of packed rows and logits; and it is written as it was read."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, **KINDS[kind], pad_token_id=0, tie_word_embeddings=tied)
    theirs = AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = read_json(tmp_path / "theirs" / "config.json")
    assert llama.InferenceLlama.readable(stored)
    ours = llama.InferenceLlama(stored)
    load_strict(ours, theirs.state_dict(), "made here")
    segments_BL = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions_BL, ids_BL = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [*range(8)]]), torch.randint(1, 64, (2, 8))
    found = []
    for lm in (ours, theirs):
        backbone = Backbone(lm).eval()
        hidden = backbone.forward_packed(backbone.embed(ids_BL), positions_BL, segments_BL)
        found.append(backbone.logits(hidden)[segments_BL > 0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def test_configs_that_are_not_read_here() -> None:
    plain = LlamaConfig(**SMALL).to_dict()
    assert llama.InferenceLlama.readable(plain)
    scaled = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}
    for other in ({"model_type": "qwen3"}, {"hidden_act": "gelu"}, scaled, {"rope_parameters": None}):
        assert not llama.InferenceLlama.readable(plain | other)


def test_only_a_plain_llama_fits() -> None:
    other = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=8, pad_token_id=0))
    gelu = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, hidden_act="gelu", pad_token_id=0))
    assert not llama.is_plain_llama(other.model) and not llama.is_plain_llama(gelu.model)


@torch.inference_mode()
def test_positions_are_not_rounded_with_the_weights() -> None:
    """A frequency in bfloat16 would turn position 1,000 by radians."""
    exact, rounded = llama.RotaryEmbedding(32, 1e4), llama.RotaryEmbedding(32, 1e4).to(torch.bfloat16)
    at_BL = torch.tensor([[0, 1, 1000]])
    for one, other in zip(exact(torch.zeros(1), at_BL), rounded(torch.zeros(1), at_BL), strict=True):
        assert torch.equal(one, other)
