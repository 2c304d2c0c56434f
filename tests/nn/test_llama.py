"""Llama blocks read straight through equal `transformers`' own, step by step, whatever the configuration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from unigen.nn import llama
from unigen.nn.backbone import Backbone, SlotCache

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
    assert llama.fits(lm.model)
    ids_BL = torch.randint(1, 64, (2, 9))

    def steps() -> list[torch.Tensor]:
        cache, outputs = SlotCache(2, 2, torch.device("cpu")), []
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            positions_BL, mask = cache.begin([0, 1], stop - start)
            outputs.append(backbone.hidden(backbone.embed(ids_BL[:, start:stop]), positions_BL, mask, cache))
            cache.keep([0, 1], [stop - start] * 2)
        return outputs

    ours = torch.cat(steps(), 1)
    monkeypatch.setattr(llama, "fits", lambda decoder: False)
    theirs = torch.cat(steps(), 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_only_a_plain_llama_fits() -> None:
    other = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=8, pad_token_id=0))
    gelu = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, hidden_act="gelu", pad_token_id=0))
    assert not llama.fits(other.model) and not llama.fits(gelu.model)
