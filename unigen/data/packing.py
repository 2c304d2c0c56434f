"""Endless packed rows of documents, each a pure function of (seed, index): any worker makes the same row, and a run
resumes by its index alone. Does not depend on what the documents are about and how they become ids.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unigen.batch import Batch, Tokens, pack


class PackedDataset:
    """Row i holds documents drawn from `make_shards(rng)`, rng seeded by (seed, i), until `patience` of them did not
    fit.

    length: positions of a row. Raises ValueError where a single document is longer than a row.
    """

    def __init__(
        self, make: Callable[[np.random.Generator], Tokens], length: int, seed: int, patience: int = 3
    ) -> None:
        self.make, self.length, self.seed, self.patience = make, length, seed, patience

    def __getitem__(self, index: int) -> list[Tokens]:
        rng = np.random.default_rng([self.seed, index])
        row: list[Tokens] = []
        free_length, misses = self.length, 0
        while misses < self.patience:
            tokens = self.make(rng)
            if len(tokens) > self.length:
                raise ValueError(f"a document of {len(tokens)} ids exceeds a row of {self.length}: raise `length`")
            if len(tokens) <= free_length:
                row.append(tokens)
                free_length -= len(tokens)
            else:
                misses += 1
        return row


class PackCollator:
    """Rows of documents as one `Batch`."""

    def __init__(self, length: int, image_size: int) -> None:
        self.length, self.image_size = length, image_size

    def __call__(self, rows: list[list[Tokens]]) -> Batch:
        """Rows of documents as one batch."""
        return pack(rows, self.length, self.image_size)
