"""From a user's seed to generators of random numbers.

    make_rng(seed)               # torch's own, of the whole seed
    make_rng(seed, 2)            # that of part 2 of what the seed draws
    offset_seed(seed, i)              # of answer i of several: seed, seed + 1, ..

Seeds have 64 bits, but torch's generator on a CPU reads the low 32 of the number that it is given: seeds 0 and 2**32
would draw alike. So what stands above these bits is hashed and mixed into them. Seeds below 2**32 are as they are.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from unigen.utils.option_types import SEED

if TYPE_CHECKING:
    import torch

SEED_FACTOR = 1_000_003
LOW_BITS = 32
NUM_SEEDS = SEED.high + 1


def derive_seed(seed: int, *numbers: int, factor: int = SEED_FACTOR) -> int:
    """The seed, in [0, 2**63), of a part of what `seed` draws: with numbers a, b it is (seed * factor + a) * factor + b
    where the seed is below 2**32, and its low 32 bits differ from those of other seeds."""
    mixed_seed = seed & ((1 << LOW_BITS) - 1)
    for number in numbers:
        mixed_seed = mixed_seed * factor + number
    if high := seed >> LOW_BITS:
        mixed_seed ^= int.from_bytes(hashlib.blake2b(high.to_bytes(8, "little"), digest_size=8).digest(), "little")
    return mixed_seed % (1 << 63)


def make_rng(seed: int, *numbers: int) -> torch.Generator:
    """A generator on the CPU for a seed, or for a part of what it draws."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *numbers))


def offset_seed(seed: int, count: int) -> int:
    """The seed `count` after this one; 0 follows the last."""
    return (seed + count) % NUM_SEEDS
