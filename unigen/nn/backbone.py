"""The backbone: any decoder-only `transformers` model, driven as (embeddings, positions, mask, cache) -> hidden states.

We own masks, positions and what is cached; the model owns its blocks. Does not depend on: vocabularies, images,
losses, sampling.

Shapes: B rows, L positions of a step, D width, K positions of the cache.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unigen.nn.attention import cached_mask, packed_mask, register_attention
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

    def hidden(self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None) -> Tensor:
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

    def packed(
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


class _SlotLayer:
    """Keys and values of one layer, (slots, heads, capacity, head_dim), written where `SlotCache` says."""

    def __init__(self, owner: SlotCache) -> None:
        self.owner = weakref.proxy(owner)  # a cycle would keep all keys and values until it is collected
        self.keys = self.values = torch.empty(0, 0, 0, 0)

    def reserve(self, key_BHLE: Tensor, value_BHLE: Tensor) -> None:
        slots, capacity = self.owner.slots, self.owner.capacity
        if not self.keys.numel():
            dtype, heads = self.owner.dtype or key_BHLE.dtype, key_BHLE.shape[1]
            self.keys = key_BHLE.new_zeros(slots, heads, capacity, key_BHLE.shape[-1], dtype=dtype)
            self.values = value_BHLE.new_zeros(slots, heads, capacity, value_BHLE.shape[-1], dtype=dtype)
        elif capacity > self.keys.shape[2] or slots > len(self.keys):
            padding = (0, 0, 0, capacity - self.keys.shape[2], 0, 0, 0, slots - len(self.keys))
            self.keys, self.values = nn.functional.pad(self.keys, padding), nn.functional.pad(self.values, padding)

    def update(self, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        self.reserve(key_BHLE, value_BHLE)
        step, count = self.owner.step, key_BHLE.shape[2]
        rows = len(step.rows)
        if step.aligned:  # slices cost less than indexed writes
            keys, values = self.keys, self.values
            if rows != len(keys):
                keys, values = keys.narrow(0, step.first, rows), values.narrow(0, step.first, rows)
            keys.narrow(2, step.at, count).copy_(key_BHLE)
            values.narrow(2, step.at, count).copy_(value_BHLE)
            return keys.narrow(2, 0, step.keys), values.narrow(2, 0, step.keys)
        places = step.places(key_BHLE.shape[1], self.keys.shape[2])
        for tensor, new_BHLE in ((self.keys, key_BHLE), (self.values, value_BHLE)):
            tensor.view(-1, tensor.shape[-1]).index_copy_(0, places, new_BHLE.flatten(0, 2).to(tensor.dtype))
        if step.contiguous:
            slot_range = slice(step.first, step.first + rows)
            return self.keys[slot_range, :, : step.keys], self.values[slot_range, :, : step.keys]
        return self.keys[step.rows_B, :, : step.keys], self.values[step.rows_B, :, : step.keys]


class _StepPlan:
    """Where one forward pass writes and reads; worked out once and used by every layer."""

    def __init__(self, rows: list[int], lengths: Tensor, queries: int, device: torch.device) -> None:
        self.rows = rows
        self.first = rows[0]
        self.contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self.lengths = lengths.tolist()
        self.at = self.lengths[0]
        self.aligned = self.contiguous and bool((lengths == lengths[0]).all())
        self.keys = int(lengths.max()) + queries
        self.needs_no_mask = self.aligned and queries == 1
        """Does every query see all keys that are read?"""
        self.rows_B = torch.tensor(rows, device=device)
        self.at_BL = (lengths[:, None] + torch.arange(queries)).to(device)
        self._places: dict[tuple[int, int], Tensor] = {}

    def places(self, heads: int, capacity: int) -> Tensor:
        """Where the keys (B, heads, L) are written among all of a layer's, (slots, heads, capacity)."""
        if (heads, capacity) not in self._places:
            head_BH = self.rows_B[:, None] * heads + torch.arange(heads, device=self.rows_B.device)
            self._places[heads, capacity] = (head_BH[:, :, None] * capacity + self.at_BL[:, None]).flatten()
        return self._places[heads, capacity]


class SlotCache:
    """A cache of numbered slots, each with a length of its own: rows join, leave and roll back without each other.

    It has those methods of transformers' `Cache` that decoders call. transformers is not imported: that takes seconds.

    A step writes its keys after each slot's length. What of them stays is said afterwards by `keep`: one position for
    next-token prediction, none for masked prediction, the accepted ones for speculative decoding. slots: in use from
    the start. dtype: in which keys and values are kept; None is as they come.
    """

    def __init__(self, layers: int, slots: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.used, self.slots, self.capacity, self.device, self.dtype = slots, slots, 0, device, dtype
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.notes: dict[int, Tensor] = {}
        """What a backbone keeps of a slot beside keys and values, from the slot's first position on."""
        self.step: _StepPlan
        self.layers = [_SlotLayer(self) for _ in range(layers)]

    # ---------------------------------------------------------------- what transformers' decoders call

    is_compileable = False

    def update(
        self, key_BHLE: Tensor, value_BHLE: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values of a layer; all that the step's rows may see of them."""
        return self.layers[layer_idx].update(key_BHLE, value_BHLE)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.lengths.max())

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.step.keys, 0

    # ---------------------------------------------------------------- slots

    def clear(self, slots: Sequence[int]) -> None:
        """Zero what is kept of these slots. Masked keys have weight 0, but 0 times nan is nan."""
        for layer in self.layers:
            if layer.keys.numel():
                for slot in slots:
                    layer.keys[slot], layer.values[slot] = 0, 0

    def take(self) -> int:
        """One slot more, an empty one: its number, after all that are in use."""
        self.used += 1
        if self.used > self.slots:
            num_new = max(self.used, self.slots + self.slots // 2) - self.slots
            self.lengths = nn.functional.pad(self.lengths, (0, num_new))
            self.slots += num_new
        return self.used - 1

    def leave(self, slot: int) -> int:
        """The slot is given back, and the last one moves to its place, so that those in use stay in a row: the number
        that the last one had."""
        self.used -= 1
        last_slot, length = self.used, int(self.lengths[self.used])
        if slot != last_slot:
            for layer in self.layers if length else ():
                for tensor in (layer.keys, layer.values):
                    tensor[slot, :, :length] = tensor[last_slot, :, :length]
            self.lengths[slot] = length
            self.notes.pop(slot, None)
            if last_slot in self.notes:
                self.notes[slot] = self.notes[last_slot]
        self.lengths[last_slot] = 0
        self.notes.pop(last_slot, None)
        return last_slot

    def begin(self, rows: list[int], queries: int, attend_until_BQ: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prepare a step of `queries` positions for these slots: their positions (B, L) and the mask.

        attend_until_BQ: the last of the step's positions that each of them sees; None is causal.
        """
        lengths = self.lengths[rows]
        needed = int(lengths.max()) + queries
        if needed > self.capacity:
            self.capacity = max(needed, 2 * self.capacity, 128)
        self.step = _StepPlan(rows, lengths, queries, self.device)
        return self.step.at_BL, cached_mask(lengths, queries, self.step.keys, attend_until_BQ).to(self.device)

    def keep(self, rows: list[int], counts: list[int]) -> None:
        for slot, count in zip(rows, counts, strict=True):
            self.lengths[slot] += count
