"""Seeds of 64 bits: below 2**32 they are what they were, above that none repeats another.

Run: pytest tests/samplers/test_seeds.py
"""

from __future__ import annotations

import torch

from unigen.samplers.seeds import derive_seed, make_rng, offset_seed

LARGE = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**52, 2**53 + 1, 2**62, 2**63, 2**63 + 1, 2**64 - 1]


def drawn(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def test_seeds_below_32_bits_draw_what_they_drew() -> None:
    for seed in (0, 1, 7, 2**31, 2**32 - 1):
        assert derive_seed(seed) == seed
        assert derive_seed(seed, 3) == seed * 1_000_003 + 3
        assert derive_seed(seed, 2, 3) == ((seed * 1_000_003 + 2) * 1_000_003 + 3) % 2**63
        assert drawn(make_rng(seed)) == drawn(torch.Generator().manual_seed(seed))


def test_no_seed_draws_as_another_does() -> None:
    for numbers in ((), (1,), (2, 1)):
        assert len({drawn(make_rng(seed, *numbers)) for seed in LARGE}) == len(LARGE)
        assert len({derive_seed(seed, *numbers) % 2**32 for seed in range(2**40, 2**40 + 1000)}) == 1000
    # the control: what torch makes of a seed alone
    assert drawn(torch.Generator().manual_seed(0)) == drawn(torch.Generator().manual_seed(2**32))


def test_parts_of_one_seed_differ() -> None:
    for seed in LARGE:
        assert len({drawn(make_rng(seed, number)) for number in range(50)}) == 50
        assert all(0 <= derive_seed(seed, number, 5) < 2**63 for number in range(50))


def test_the_seed_after_the_last_is_the_first() -> None:
    assert offset_seed(4, 3) == 7 and offset_seed(2**64 - 1, 1) == 0
