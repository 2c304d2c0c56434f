"""The cache of keys and values: numbered slots, each with a length of its own.

It has those methods of transformers' `Cache` that decoders call; transformers is not imported, since that takes
seconds. Does not depend on: what a backbone computes, how rows are scheduled.

Shapes: B rows of a step, L positions of the step, H heads, E head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unigen.nn.attention import cached_mask


class _SlotLayer:
    """Keys and values of one layer, (slots, heads, capacity, head_dim), written where the cache's step says."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = weakref.proxy(cache)  # a cycle would keep all keys and values until it is collected
        self.keys = self.values = torch.empty(0, 0, 0, 0)

    def reserve(self, key_BHLE: Tensor, value_BHLE: Tensor) -> None:
        """Make room for all slots at the cache's capacity."""
        slots, capacity = self.cache.num_slots, self.cache.capacity
        if not self.keys.numel():
            dtype, heads = self.cache.dtype or key_BHLE.dtype, key_BHLE.shape[1]
            self.keys = key_BHLE.new_zeros(slots, heads, capacity, key_BHLE.shape[-1], dtype=dtype)
            self.values = value_BHLE.new_zeros(slots, heads, capacity, value_BHLE.shape[-1], dtype=dtype)
        elif capacity > self.keys.shape[2] or slots > len(self.keys):
            padding = (0, 0, 0, capacity - self.keys.shape[2], 0, 0, 0, slots - len(self.keys))
            self.keys, self.values = nn.functional.pad(self.keys, padding), nn.functional.pad(self.values, padding)

    def update(self, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values, and return all that its rows may see, (B, H, keys, E)."""
        self.reserve(key_BHLE, value_BHLE)
        step, count = self.cache.step, key_BHLE.shape[2]
        rows = len(step.slots)
        if step.is_aligned:  # slices cost less than indexed writes
            keys, values = self.keys, self.values
            if rows != len(keys):
                keys, values = keys.narrow(0, step.first_slot, rows), values.narrow(0, step.first_slot, rows)
            keys.narrow(2, step.offset, count).copy_(key_BHLE)
            values.narrow(2, step.offset, count).copy_(value_BHLE)
            return keys.narrow(2, 0, step.num_keys), values.narrow(2, 0, step.num_keys)
        index = step.write_index(key_BHLE.shape[1], self.keys.shape[2])
        for tensor, new_BHLE in ((self.keys, key_BHLE), (self.values, value_BHLE)):
            tensor.view(-1, tensor.shape[-1]).index_copy_(0, index, new_BHLE.flatten(0, 2).to(tensor.dtype))
        if step.is_contiguous:
            slot_range = slice(step.first_slot, step.first_slot + rows)
            return self.keys[slot_range, :, : step.num_keys], self.values[slot_range, :, : step.num_keys]
        return self.keys[step.slots_B, :, : step.num_keys], self.values[step.slots_B, :, : step.num_keys]


class _StepPlan:
    """Where one forward pass writes and reads; computed once and used by every layer.

    Args:
        slots: the slot of each row.
        lengths: cached positions (B,) of each row.
        queries: positions L of the step.
        device: device of the cache.
    """

    def __init__(self, slots: list[int], lengths: Tensor, queries: int, device: torch.device) -> None:
        self.slots = slots
        self.first_slot = slots[0]
        self.is_contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        """Are the slots neighbours, in order?"""
        self.lengths = lengths.tolist()
        self.offset = self.lengths[0]
        """Where the first row writes."""
        self.is_aligned = self.is_contiguous and bool((lengths == lengths[0]).all())
        """Do all rows write at the same positions?"""
        self.num_keys = int(lengths.max()) + queries
        self.needs_no_mask = self.is_aligned and queries == 1
        """Does every query see all keys that are read?"""
        self.slots_B = torch.tensor(slots, device=device)
        self.positions_BL = (lengths[:, None] + torch.arange(queries)).to(device)
        self._write_index: dict[tuple[int, int], Tensor] = {}

    def write_index(self, heads: int, capacity: int) -> Tensor:
        """Flat indices (B heads L,) of the step's keys among all of a layer's, (slots, heads, capacity)."""
        if (heads, capacity) not in self._write_index:
            head_BH = self.slots_B[:, None] * heads + torch.arange(heads, device=self.slots_B.device)
            index_BHL = head_BH[:, :, None] * capacity + self.positions_BL[:, None]
            self._write_index[heads, capacity] = index_BHL.flatten()
        return self._write_index[heads, capacity]


class SlotCache:
    """A cache of numbered slots, each with a length of its own: rows join, leave and roll back without each other.

    A step writes its keys after each slot's length. `commit` then says how many of them stay: one position for
    next-token prediction, none for masked prediction, the accepted ones for speculative decoding.

    Args:
        layers: number of layers of the decoder.
        slots: number of slots in use from the start.
        device: device of the keys and values.
        dtype: dtype in which they are stored; None is the dtype in which the first step computes them.
    """

    def __init__(self, layers: int, slots: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.num_used, self.num_slots, self.capacity, self.device, self.dtype = slots, slots, 0, device, dtype
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        """Cached positions of each slot, on the CPU."""
        self.slot_state: dict[int, Tensor] = {}
        """What a backbone keeps of a slot beside keys and values, from the slot's first position on."""
        self.step: _StepPlan
        self.layers = [_SlotLayer(self) for _ in range(layers)]

    # ---------------------------------------------------------------- methods that transformers' decoders call

    is_compileable = False

    def update(
        self, key_BHLE: Tensor, value_BHLE: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values of a layer.

        Args:
            key_BHLE: keys of the step.
            value_BHLE: values of the step.
            layer_idx: index of the layer.
            *_: other arguments of transformers' decoders; not used.
            **__: the same.

        Returns:
            All keys and values (B, H, keys, E) that the step's rows may see.
        """
        return self.layers[layer_idx].update(key_BHLE, value_BHLE)

    @property
    def is_sliding(self) -> list[bool]:
        """Whether each layer has a sliding window: none has."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions of the longest slot."""
        return int(self.lengths.max())

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the step's first query in the longest slot."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that the step reads, and the index of the first."""
        return self.step.num_keys, 0

    # ---------------------------------------------------------------- slots

    def clear(self, slots: Sequence[int]) -> None:
        """Set the keys and values of slots to zero. Masked keys have weight 0, but 0 times nan is nan.

        Args:
            slots: numbers of slots.
        """
        for layer in self.layers:
            if layer.keys.numel():
                for slot in slots:
                    layer.keys[slot], layer.values[slot] = 0, 0

    def allocate(self) -> int:
        """Take an empty slot.

        Returns:
            Its number, which follows those of all slots in use.
        """
        self.num_used += 1
        if self.num_used > self.num_slots:
            num_new = max(self.num_used, self.num_slots + self.num_slots // 2) - self.num_slots
            self.lengths = nn.functional.pad(self.lengths, (0, num_new))
            self.num_slots += num_new
        return self.num_used - 1

    def free(self, slot: int) -> int:
        """Give a slot back. The last slot moves to its place, so that the slots in use stay contiguous.

        Args:
            slot: number of the slot.

        Returns:
            The number that the last slot had before it moved.
        """
        self.num_used -= 1
        last_slot, length = self.num_used, int(self.lengths[self.num_used])
        if slot != last_slot:
            for layer in self.layers if length else ():
                for tensor in (layer.keys, layer.values):
                    tensor[slot, :, :length] = tensor[last_slot, :, :length]
            self.lengths[slot] = length
            self.slot_state.pop(slot, None)
            if last_slot in self.slot_state:
                self.slot_state[slot] = self.slot_state[last_slot]
        self.lengths[last_slot] = 0
        self.slot_state.pop(last_slot, None)
        return last_slot

    def begin_step(
        self, slots: list[int], queries: int, attend_until_BQ: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prepare a step.

        Args:
            slots: the slot of each row.
            queries: positions L of each row.
            attend_until_BQ: the last of the step's positions that each of them attends to; None is causal.

        Returns:
            The positions (B, L) and the mask (B, 1, L, keys).
        """
        lengths = self.lengths[slots]
        needed = int(lengths.max()) + queries
        if needed > self.capacity:
            self.capacity = max(needed, 2 * self.capacity, 128)
        self.step = _StepPlan(slots, lengths, queries, self.device)
        mask = cached_mask(lengths, queries, self.step.num_keys, attend_until_BQ)
        return self.step.positions_BL, mask.to(self.device)

    def commit(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first positions of the step.

        Args:
            slots: numbers of slots.
            counts: positions that each of them keeps; a negative count removes cached positions.
        """
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
