"""The blocks of a Llama, read straight through: what `transformers` computes, without what it does around each layer.

A decoding step of a small model is bound by the number of its operations and calls, not by its weights. Here a layer
turns queries and keys together and calls only its linear maps as modules, so that whatever stands in their place
(adapters, quantised weights, faster products) still does. Nothing is copied or kept. For inference with a cache.
The file refuses to know: embeddings, heads, masks, how a cache stores.

Shapes: B rows, L positions, D width, H query heads, K key heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from unigen.nn.attention import packed_attention
from unigen.nn.few_rows import side_by_side


def fits(decoder: Any) -> bool:
    """Is this a plain Llama, as `llama_hidden` computes it?"""
    return type(decoder).__name__ in ("LlamaModel", "Emu3TextModel") and decoder.config.hidden_act == "silu"


def llama_hidden(decoder: Any, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Hidden states (B, L, D) after the last norm. mask: additive (B, 1, L, keys).

    Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2): h = x + attention(norm(x)), y = h + mlp(norm(h)) with
    rms norms, rotary positions and mlp(x) = down(silu(gate(x)) * up(x)).
    """
    eps, width = decoder.config.rms_norm_eps, embeds_BLD.shape[-1:]
    cos_BLE, sin_BLE = decoder.rotary_emb(embeds_BLD, positions_BL)
    half = sin_BLE.shape[-1] // 2
    cos_BL1E = cos_BLE[:, :, None]
    sin_BL1E = torch.cat((-sin_BLE[..., :half], sin_BLE[..., half:]), -1)[:, :, None]
    x_BLD = embeds_BLD
    for number, layer in enumerate(decoder.layers):
        part = layer.self_attn
        normed_BLD = rms_norm(x_BLD, width, layer.input_layernorm.weight, eps)
        query, key, value = side_by_side(normed_BLD, part.q_proj, part.k_proj, part.v_proj)
        both_BLHE = torch.cat((query, key), -1).unflatten(-1, (-1, part.head_dim))
        # rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34), its pairs half a head apart
        both_BLHE = torch.addcmul(both_BLHE * cos_BL1E, both_BLHE.roll(half, -1), sin_BL1E)
        key_heads = key.shape[-1] // part.head_dim
        query_BHLE, key_BKLE = both_BLHE.transpose(1, 2).split((both_BLHE.shape[2] - key_heads, key_heads), 1)
        value_BKLE = value.unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        keys, values = cache.update(key_BKLE, value_BKLE, number)
        mixed, _ = packed_attention(part, query_BHLE, keys, values, mask, part.scaling)
        x_BLD = x_BLD + part.o_proj(mixed.flatten(2))
        part = layer.mlp
        normed_BLD = rms_norm(x_BLD, width, layer.post_attention_layernorm.weight, eps)
        gate, up = side_by_side(normed_BLD, part.gate_proj, part.up_proj)
        x_BLD = x_BLD + part.down_proj(silu(gate) * up)
    return rms_norm(x_BLD, width, decoder.norm.weight, eps)
