"""Preferences among pictures: of two that were drawn for one prompt, the right one is to become likelier.

    L = - E log sigmoid(beta [ log p(w|c) - log p_ref(w|c)  -  log p(l|c) + log p_ref(l|c) ])

is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) with w chosen, l rejected, c the prompt and p_ref the model as
training began. log p is the sum over a picture's codes in raster order, p being over image codes alone as they are
drawn, without guidance and at temperature 1. Beside it stand the losses of a mixture and - log p(w|c), by the code,
lest both become unlikely together (as in RPO, Pang et al. 2024, arXiv 2404.19733, eq. 2).

    {"prompt": "two apples", "codes": [[[5, 7, ..], ..], ..], "right": [true, false, ..]}   # a line of the judged file

The file refuses to know who drew the pictures and who judged them. Shapes: P pairs, M codes of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigen.model import UnifiedModel
from unigen.sequence import Batch, Document, Segment, Tokens, pack
from unigen.training.objectives import Mixture


@dataclass
class PreferenceConfig:
    """judged: the file of pictures to compare (`data_tools/judge_pictures.py`); none: nothing is compared."""

    judged: str | None = None
    beta: float = 0.1
    weight: float = 1.0
    nll: float = 0.3
    """Weight of - log p of the chosen pictures, in nats a code."""
    rows: int = 2
    """Rows of pairs beside each row of the mixture."""

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.weight > 0 and self.nll >= 0 and self.rows >= 1):
            raise ValueError("preferences need beta and weight above 0, nll of at least 0 and at least 1 row of pairs")


def read_pairs(file: str | Path, seed: int, grid: tuple[int, int], codes: int) -> list[tuple[str, Tensor, Tensor]]:
    """(prompt, codes (h, w) of a right picture, those of a wrong one) in random order; each picture at most once.

    grid, codes: rows and columns of a picture, and how many codes there are. Raises ValueError for a file that cannot
    be read, whose pictures are of another tokenizer, or without a prompt that has both."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[str, Tensor, Tensor]] = []
    read = 0
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                read += 1
                group = json.loads(line)
                codes_Khw, right_K = torch.tensor(group["codes"]), np.array(group["right"])
                if codes_Khw.shape != (len(right_K), *grid) or codes_Khw.is_floating_point():
                    raise ValueError(f"pictures of {tuple(codes_Khw.shape[1:])} codes, not {grid}, or of other numbers")
                if codes_Khw.min() < 0 or codes_Khw.max() >= codes:
                    raise ValueError(f"codes beyond the {codes} there are")
                if right_K.dtype != bool or not isinstance(group["prompt"], str):
                    raise ValueError("a prompt is text, and each picture right or not")
                right, wrong = rng.permutation(right_K.nonzero()[0]), rng.permutation((~right_K).nonzero()[0])
                for chosen, rejected in zip(right, wrong, strict=False):
                    pairs.append((group["prompt"], codes_Khw[chosen], codes_Khw[rejected]))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"line {read} of {file} does not hold judged pictures: {error}") from error
    if not pairs:
        raise ValueError(f"{file} has no prompt with a right and a wrong picture: judge more pictures")
    return [pairs[k] for k in rng.permutation(len(pairs))]


class ComparedRows:
    """Item i: row i of a mixture, and rows of pairs; a pair comes again only when all have come.

    encode: a document as ids. length: positions of a row. rows: of pairs, in an item.
    """

    def __init__(
        self,
        mixture: Any,
        pairs: Sequence[tuple[str, Tensor, Tensor]],
        encode: Callable[[Document], Tokens],
        length: int,
        rows: int,
    ) -> None:
        self.mixture, self.pairs, self.encode, self.rows = mixture, pairs, encode, rows
        longest = max(len(encode(_drawn(prompt, codes_hw))) for prompt, codes_hw, _ in pairs)
        self.fit = length // (2 * longest)
        """Pairs of a row."""
        if not self.fit:
            raise ValueError(f"a pair of {2 * longest} ids exceeds a row of {length}: raise `length`")

    def __getitem__(self, index: int) -> tuple[Any, list[list[Tokens]]]:
        rows = [self._row(index * self.rows + k) for k in range(self.rows)]
        return self.mixture[index], rows

    def _row(self, number: int) -> list[Tokens]:
        pairs = [self.pairs[(number * self.fit + k) % len(self.pairs)] for k in range(self.fit)]
        return [self.encode(_drawn(prompt, codes_hw)) for prompt, *both in pairs for codes_hw in both]


def _drawn(prompt: str, codes_hw: Tensor) -> Document:
    return Document([Segment(text=prompt), Segment(image=codes_hw, role="assistant")])


@dataclass
class Compared:
    """mixture: packed documents; pairs: packed pictures under their prompts, each chosen before its rejected one."""

    mixture: Batch
    pairs: Batch

    def to(self, device: torch.device | str) -> Compared:
        return Compared(self.mixture.to(device), self.pairs.to(device))

    def pin_memory(self) -> Compared:
        return Compared(self.mixture.pin_memory(), self.pairs.pin_memory())


class CollateCompared:
    def __init__(self, collate: Callable[[list[Any]], Batch], length: int, image_size: int) -> None:
        self.collate, self.length, self.image_size = collate, length, image_size

    def __call__(self, items: list[tuple[Any, list[list[Tokens]]]]) -> Compared:
        rows = [row for _, rows in items for row in rows]
        return Compared(self.collate([row for row, _ in items]), pack(rows, self.length, self.image_size))


class Preferences(nn.Module):
    """The losses of a mixture, and those of pairs: "preference", and "chosen", - log p of the chosen pictures in nats a
    code. metric/accuracy: the share of pairs whose chosen picture has gained on the rejected one."""

    def __init__(self, mixture: Mixture, reference: UnifiedModel, config: PreferenceConfig) -> None:
        super().__init__()
        self.mixture, self.beta = mixture, config.beta
        self.reference = reference.requires_grad_(False).eval()
        self.weights = mixture.weights | {"preference": config.weight, "chosen": config.nll}

    def forward(self, model: Any, batch: Compared, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        losses = self.mixture(model, batch.mixture, rng)
        pairs = model.fill(batch.pairs)
        policy_P2 = log_likelihood(model, pairs)
        with torch.no_grad():
            reference_P2 = log_likelihood(self.reference, pairs)
        gain_P2 = policy_P2 - reference_P2
        margin_P = gain_P2[:, 0] - gain_P2[:, 1]
        count = len(margin_P)
        losses["preference"] = -nn.functional.logsigmoid(self.beta * margin_P).sum(), count
        losses["chosen"] = -policy_P2[:, 0].sum(), count * (pairs.spans_N3[0, 2] - pairs.spans_N3[0, 1])
        losses["metric/accuracy"] = (margin_P > 0).sum(), count
        losses["metric/tokens"] = losses["metric/tokens"][0] + (pairs.segments_BL > 0).sum(), 1
        return losses

    def counts(self, batch: Compared, rng: torch.Generator) -> dict[str, Tensor | int]:
        spans_N3 = batch.pairs.spans_N3
        count = len(spans_N3) // 2
        codes = count * (spans_N3[0, 2] - spans_N3[0, 1])
        return self.mixture.counts(batch.mixture, rng) | {
            "preference": count,
            "chosen": codes,
            "metric/accuracy": count,
        }


def log_likelihood(model: UnifiedModel, batch: Batch) -> Tensor:
    """log p (nats) of the codes of each picture among image codes, given what stands before it, as (P, 2). batch:
    filled, one picture a document, each chosen before its rejected."""
    hidden_BLD = model.hidden(batch)
    rows_N1, at_NM = batch.places(torch.arange(len(batch.spans_N3)))
    first, stop = model.vocabulary.text_size, model.vocabulary.size
    logits = model.logits(hidden_BLD[rows_N1, at_NM - 1], first, stop).float()
    nats_NM = nn.functional.cross_entropy(
        logits.flatten(0, 1), (batch.ids_BL[rows_N1, at_NM] - first).flatten(), reduction="none"
    ).view(at_NM.shape)
    return -nats_NM.sum(-1).unflatten(0, (-1, 2))
