"""The backbone: any decoder-only `transformers` model, driven as (embeddings, positions, mask, cache) -> hidden states.

This class owns masks, positions and the cache; the model owns its blocks. Does not depend on: vocabularies, images,
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
    """A causal language model of transformers, or `InferenceLlama`, without its own masks and cache.

    Args:
        lm: a `...ForCausalLM`. Its embeddings, decoder and head are reached by the names that all models share.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        if not isinstance(lm, llama.InferenceLlama):
            lm.set_attn_implementation(register_attention())

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return int(self.lm.config.get_text_config().hidden_size)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Token embeddings (B, L, D) of ids (B, L)."""
        return self.lm.get_input_embeddings()(ids_BL)

    def new_cache(self, slots: int, device: torch.device) -> SlotCache:
        """An empty cache of keys and values.

        On a CPU it is in float32, whatever the dtype of the weights: there, products of one query with keys in half
        precision are several times slower.

        Args:
            slots: number of slots.
            device: device of the keys and values.

        Returns:
            The cache, with all slots in use and of length 0.
        """
        layers = self.lm.config.get_text_config().num_hidden_layers
        return SlotCache(layers, slots, device, torch.float32 if device.type == "cpu" else None)

    def forward_cached(
        self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None
    ) -> Tensor:
        """One step of the decoder with a cache.

        Args:
            embeds_BLD: embeddings of the positions of the step.
            positions_BL: position ids, from 0.
            mask: bool (B, 1, L, K), True where a key may be seen.
            cache: keys and values of earlier positions; the step's own are written to it. None reads without a cache.

        Returns:
            Hidden states (B, L, D) after the last norm.
        """
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
            embeds_BLD: embeddings of the rows.
            positions_BL: each position in its document, from 0.
            segments_BL: the document of each position, from 1; 0 is padding.
            attend_until_BL: the last position of its row that each position attends to; None is causal.

        Returns:
            Hidden states (B, L, D) after the last norm.
        """
        output = self.lm.get_decoder()(
            inputs_embeds=embeds_BLD,
            position_ids=positions_BL,
            attention_mask=packed_mask(segments_BL[:, :1]),  # not read: attention uses `packing`
            use_cache=False,
            packing=pack_documents(segments_BL, attend_until_BL),
        )
        return output.last_hidden_state

    def compile_packed(self) -> None:
        """Compile the decoder with torch.compile, for training on packed rows of one shape.

        torch.compile fuses the operations between the matrix products.

        Raises:
            ValueError: on a CPU without a C++ compiler, and for a decoder whose cached steps would be compiled too.
        """
        if not torch.cuda.is_available() and not (shutil.which("c++") or shutil.which("g++")):
            raise ValueError("compile=true needs a C++ compiler on a CPU: install g++, or leave it out")
        if not llama.is_plain_llama(self.lm.get_decoder()):
            raise ValueError(f"compile=true is for Llama backbones, not {self.lm.config.model_type}: leave it out")
        self.lm.set_attn_implementation(register_attention(compiled=True))
        self.lm.get_decoder().compile(dynamic=False)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of a part of the vocabulary: an image segment computes no logits of text.

        Args:
            hidden: hidden states (..., D).
            start: first id.
            stop: the id after the last; None is the end of the vocabulary.

        Returns:
            Logits (..., stop - start).
        """
        head = self.lm.get_output_embeddings()
        return packed_linear(hidden, head.weight, head.bias, start, stop)
