"""Llama without `transformers`: its blocks as one function, and its modules for inference.

A decoding step of a small model is bound by the number of its operations and calls, not by its weights. `llama_hidden`
rotates queries and keys together and calls only a layer's linear maps as modules, so that their replacements (adapters,
quantised weights, faster products) still work. `InferenceLlama` has the parameters of transformers' `LlamaForCausalLM`
under the same names; importing transformers' takes longer than drawing an image.
Does not depend on: masks, how a cache stores.

Shapes: B rows, L positions, D width, H query heads, K key heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from unigen.nn.attention import PackedDocuments, attention_forward
from unigen.nn.cpu.linear import fused_linears

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from unigen.nn.cache import SlotCache


def is_plain_llama(decoder: Any) -> bool:
    """Whether a decoder is a plain Llama, as `llama_hidden` computes it.

    Args:
        decoder: of transformers, or a `LlamaDecoder`.
    """
    names = ("LlamaModel", "Emu3TextModel", "LlamaDecoder")
    return type(decoder).__name__ in names and decoder.config.hidden_act == "silu"


def llama_hidden(
    decoder: Any,
    embeds_BLD: Tensor,
    positions_BL: Tensor,
    mask: Tensor | None,
    cache: SlotCache | None = None,
    packing: PackedDocuments | None = None,
) -> Tensor:
    """The forward pass of a Llama decoder.

    Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2): h = x + attention(norm(x)), y = h + mlp(norm(h)) with
    rms norms, rotary positions and mlp(x) = down(silu(gate(x)) * up(x)).

    Args:
        decoder: one for which `is_plain_llama` holds.
        embeds_BLD: input embeddings.
        positions_BL: position ids, from 0.
        mask: additive (B, 1, L, keys); None where every key may be seen.
        cache: keys and values of earlier positions; None reads without a cache.
        packing: the documents of packed rows, which are read without a cache; then the mask is not read.

    Returns:
        Hidden states (B, L, D) after the last norm.
    """
    eps = torch.tensor(decoder.config.rms_norm_eps)
    cos_BLE, sin_BLE = decoder.rotary_emb(embeds_BLD, positions_BL)
    half_width = sin_BLE.shape[-1] // 2
    cos_BL1E = cos_BLE[:, :, None]
    sin_BL1E = torch.cat((-sin_BLE[..., :half_width], sin_BLE[..., half_width:]), -1)[:, :, None]
    x_BLD = embeds_BLD
    for number, layer in enumerate(decoder.layers):
        part = layer.self_attn
        normed_BLD = _rms_norm(x_BLD, layer.input_layernorm.weight, eps)
        query_key, value = fused_linears(normed_BLD, (part.q_proj, part.k_proj), (part.v_proj,))
        query_key_BLHE = query_key.unflatten(-1, (-1, part.head_dim))
        # rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34), its pairs half a head apart
        query_key_BLHE = torch.addcmul(query_key_BLHE * cos_BL1E, query_key_BLHE.roll(half_width, -1), sin_BL1E)
        key_heads = value.shape[-1] // part.head_dim
        query_BHLE, key_BKLE = query_key_BLHE.transpose(1, 2).split_with_sizes(
            (query_key_BLHE.shape[2] - key_heads, key_heads), 1
        )
        value_BKLE = value.unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        keys, values = (key_BKLE, value_BKLE) if cache is None else cache.update(key_BKLE, value_BKLE, number)
        attended, _ = attention_forward(part, query_BHLE, keys, values, mask, part.scaling, packing=packing)
        x_BLD = x_BLD + part.o_proj(attended.flatten(2))
        part = layer.mlp
        normed_BLD = _rms_norm(x_BLD, layer.post_attention_layernorm.weight, eps)
        gate, up = fused_linears(normed_BLD, (part.gate_proj,), (part.up_proj,))
        x_BLD = x_BLD + part.down_proj(silu(gate) * up)
    return _rms_norm(x_BLD, decoder.norm.weight, eps)


def _rms_norm(x: Tensor, weight_D: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4). torch has no kernel of it
    for a CPU and runs more operations than this."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
        return rms_norm(x, x.shape[-1:], weight_D, float(eps))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * weight_D).mul_(scale)


# --- modules --------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """The weight of an RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class RotaryEmbedding(nn.Module):
    """Cosines and sines (B, L, E) of rotary positions: angle = position * base^(-2 i / E), of each pair at i
    and at i + E / 2 (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        # not a buffer, which would be rounded with the weights: an angle is position times frequency
        self.frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)

    def forward(self, x: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, L, E), in x's dtype, of positions (B, L)."""
        self.frequencies = self.frequencies.to(x.device)
        angles_BLE = positions_BL[:, :, None].float() * self.frequencies
        angles_BLE = torch.cat((angles_BLE, angles_BLE), -1)
        return angles_BLE.cos().to(x.dtype), angles_BLE.sin().to(x.dtype)


class Attention(nn.Module):
    """Projections of self-attention, and the settings that `llama_hidden` reads of them."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        heads, keys, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups, self.is_causal = heads // keys, True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = empty_linear(width, heads * self.head_dim, bias)
        self.k_proj = empty_linear(width, keys * self.head_dim, bias)
        self.v_proj = empty_linear(width, keys * self.head_dim, bias)
        self.o_proj = empty_linear(heads * self.head_dim, width, bias)


class MLP(nn.Module):
    """Projections of the gated MLP."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = empty_linear(width, inner, bias)
        self.up_proj = empty_linear(width, inner, bias)
        self.down_proj = empty_linear(inner, width, bias)


class DecoderLayer(nn.Module):
    """One block: attention, MLP and their norms."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)


class LlamaDecoder(nn.Module):
    """Embeddings and blocks: transformers' `LlamaModel`, computed by `llama_hidden`."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_parameters["rope_theta"])

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SlotCache | None = None,
        use_cache: bool = False,
        packing: PackedDocuments | None = None,
    ) -> SimpleNamespace:
        """The forward pass, with the arguments of transformers' decoders.

        Args:
            inputs_embeds: input embeddings (B, L, D).
            position_ids: position ids (B, L), from 0.
            attention_mask: additive (B, 1, L, keys); None where every key may be seen.
            past_key_values: keys and values of earlier positions.
            use_cache: whether to read and write `past_key_values`.
            packing: the documents of packed rows, which are read without a cache.

        Returns:
            An object with `last_hidden_state` (B, L, D).
        """
        cache = past_key_values if use_cache else None
        states_BLD = llama_hidden(self, inputs_embeds, position_ids, attention_mask, cache, packing)
        return SimpleNamespace(last_hidden_state=states_BLD)


class InferenceLlama(nn.Module):
    """A Llama language model for inference: transformers' `LlamaForCausalLM` with the same parameters.

    Args:
        config: the content of its config.json; `readable` says whether this class can run it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config_dict = dict(config)
        self.config = SimpleNamespace(**(CONFIG_DEFAULTS | self.config_dict))
        self.config.get_text_config = lambda: self.config
        heads = self.config.num_attention_heads
        self.config.num_key_value_heads = self.config.num_key_value_heads or heads
        self.config.head_dim = self.config.head_dim or self.config.hidden_size // heads
        self.model = LlamaDecoder(self.config)
        self.lm_head = empty_linear(self.config.hidden_size, self.config.vocab_size, False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def readable(config: Mapping[str, Any]) -> bool:
        """Whether this class can run a model.

        Args:
            config: the content of its config.json.

        Returns:
            True for a Llama with the blocks and rotary positions of this file.
        """
        rope = config.get("rope_parameters") or {}
        return (
            config.get("model_type") == "llama"
            and config.get("hidden_act", "silu") == "silu"
            and rope.get("rope_type") == "default"
            and "rope_theta" in rope
            and not rope.keys() - {"rope_type", "rope_theta"}
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def get_decoder(self) -> LlamaDecoder:
        """The model without its head."""
        return self.model

    def set_attn_implementation(self, name: str) -> None:
        """Do nothing: there is one implementation of attention."""

    def to_transformers(self) -> LlamaForCausalLM:
        """The same model as a `LlamaForCausalLM` of transformers, to be trained or saved."""
        from transformers import LlamaConfig, LlamaForCausalLM

        dtype = self.lm_head.weight.dtype
        lm = LlamaForCausalLM(LlamaConfig(**self.config_dict))
        nn.Module.to(lm, dtype)  # transformers' own `to` hides its type
        lm.load_state_dict(self.state_dict())
        return lm

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as transformers does.

        Args:
            folder: where config.json and the weights are written.
        """
        self.to_transformers().save_pretrained(folder)


CONFIG_DEFAULTS: dict[str, object] = {
    "model_type": "llama",
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
"""Defaults of the keys that a config.json may leave out."""


class _EmptyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        """Its weights are loaded."""


class _EmptyEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Its weights are loaded."""


def empty_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear layer whose weights are not initialised. `nn.utils.skip_init` does it too, but imports torch's compiler.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        bias: whether it has a bias.
    """
    layer: nn.Linear = _EmptyLinear(inputs, outputs, bias=bias)
    layer.__class__ = nn.Linear
    return layer


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """A table of embeddings whose weights are not initialised.

    Args:
        rows: number of ids.
        width: width of an embedding.
    """
    table: nn.Embedding = _EmptyEmbedding(rows, width)
    table.__class__ = nn.Embedding
    return table
