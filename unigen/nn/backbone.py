"""The backbone: any decoder-only `transformers` model, driven as (embeddings, positions, mask, cache) -> hidden states.

We own masks, positions and what is cached; the model owns its blocks. Does not depend on: vocabularies, images,
losses, sampling.

Shapes: B rows, L positions of a step, D width, K positions of the cache.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor, nn

from unigen.nn.attention import packed_mask, register_attention
from unigen.nn.cache import SlotCache
from unigen.nn.cpu import llama
from unigen.nn.cpu.linear import packed_linear
from unigen.nn.packed_attention import pack_documents


class Backbone(nn.Module):
    """`lm` is a `...ForCausalLM`; its embeddings and its head are reached by the names all models share."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        if not isinstance(lm, llama.InferenceLlama):
            lm.set_attn_implementation(register_attention())

    @property
    def width(self) -> int:
        return int(self.lm.config.get_text_config().hidden_size)

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids_BL)

    def new_cache(self, slots: int, device: torch.device) -> SlotCache:
        """An empty cache for so many slots. On a CPU it is in float32, whatever the weights are in: products of one
        query with the keys of half precision are several times slower there."""
        layers = self.lm.config.get_text_config().num_hidden_layers
        return SlotCache(layers, slots, device, torch.float32 if device.type == "cpu" else None)

    def forward_cached(
        self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm. mask: bool (B, 1, L, K), True where a key may be seen."""
        dtype = embeds_BLD.dtype if cache is None or cache.dtype is None else cache.dtype  # of the keys
        decoder = self.lm.get_decoder()
        additive_mask: Tensor | None = None  # where all keys may be seen: once, not in every layer
        if cache is None or not cache.step.needs_no_mask or not llama.is_plain_llama(decoder):
            additive_mask = embeds_BLD.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        if cache is not None and llama.is_plain_llama(decoder):
            return llama.llama_hidden(decoder, embeds_BLD, positions_BL, additive_mask, cache)
        output = decoder(
            inputs_embeds=embeds_BLD,
            position_ids=positions_BL,
            attention_mask=additive_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def forward_packed(
        self, embeds_BLD: Tensor, positions_BL: Tensor, segments_BL: Tensor, attend_until_BL: Tensor | None = None
    ) -> Tensor:
        """The forward pass of packed rows.

        Args:
            embeds_BLD: what is read.
            positions_BL: each position in its document, from 0.
            segments_BL: the document of each position, from 1; 0 is padding.
            attend_until_BL: the last position of its row that each position sees; None is causal.

        Returns:
            Hidden states (B, L, D) after the last norm.
        """
        output = self.lm.get_decoder()(
            inputs_embeds=embeds_BLD,
            position_ids=positions_BL,
            attention_mask=packed_mask(segments_BL[:, :1]),  # not read: `packing` says it all
            use_cache=False,
            packing=pack_documents(segments_BL, attend_until_BL),
        )
        return output.last_hidden_state

    def compile_packed(self) -> None:
        """Have torch.compile fuse what stands between the products of packed rows, for training with rows of one shape.
        Raises ValueError on a CPU without a C++ compiler, and for a decoder whose cached steps it would compile too."""
        if not torch.cuda.is_available() and not (shutil.which("c++") or shutil.which("g++")):
            raise ValueError("compile=true needs a C++ compiler on a CPU: install g++, or leave it out")
        if not llama.is_plain_llama(self.lm.get_decoder()):
            raise ValueError(f"compile=true is for Llama backbones, not {self.lm.config.model_type}: leave it out")
        self.lm.set_attn_implementation(register_attention(compiled=True))
        self.lm.get_decoder().compile(dynamic=False)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Scores of the head's rows start..stop only: a span of image codes never pays for the text's rows."""
        head = self.lm.get_output_embeddings()
        return packed_linear(hidden, head.weight, head.bias, start, stop)
