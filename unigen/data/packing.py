"""Endless packed rows of documents, each a pure function of (seed, index): any worker makes the same row, and a run
resumes by its index alone. Does not depend on: what the documents are about, how they become ids.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unigen.batch import Batch, Tokens, pack


class PackedDataset:
    """Rows of documents: row i is drawn from a generator seeded by (seed, i), until some did not fit.

    Args:
        sample_document: draws one.
        seq_len: positions of a row.
        seed: of the rows.
        max_misses: documents that may not fit before a row is finished.
    """

    def __init__(
        self, sample_document: Callable[[np.random.Generator], Tokens], seq_len: int, seed: int, max_misses: int = 3
    ) -> None:
        self.sample_document, self.seq_len, self.seed, self.max_misses = sample_document, seq_len, seed, max_misses

    def __getitem__(self, index: int) -> list[Tokens]:
        """The documents of a row. Raises ValueError where a single one is longer than a row."""
        rng = np.random.default_rng([self.seed, index])
        row: list[Tokens] = []
        free_length, misses = self.seq_len, 0
        while misses < self.max_misses:
            tokens = self.sample_document(rng)
            if len(tokens) > self.seq_len:
                raise ValueError(f"a document of {len(tokens)} ids exceeds a row of {self.seq_len}: raise `length`")
            if len(tokens) <= free_length:
                row.append(tokens)
                free_length -= len(tokens)
            else:
                misses += 1
        return row


class PackCollator:
    """Makes one `Batch` of rows of documents.

    Args:
        seq_len: positions of a row.
        image_size: pixels along a side of images.
    """

    def __init__(self, seq_len: int, image_size: int) -> None:
        self.seq_len, self.image_size = seq_len, image_size

    def __call__(self, rows: list[list[Tokens]]) -> Batch:
        """Rows of documents as one batch."""
        return pack(rows, self.seq_len, self.image_size)
