"""Preferences among answers: of two that were given to one prompt, the right one is to become likelier.

    L = - E log sigmoid(beta [ log p(w|c) - log p_ref(w|c)  -  log p(l|c) + log p_ref(l|c) ])

is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) with w chosen, l rejected, c the prompt and p_ref the model as
training began. An answer is a picture or a text, and log p the sum over its ids. p is what answers are drawn from: of
text the prediction itself, of codes what guidance and temperature make of it, softmax((u + s (c - u)) / T) with the
blind branch u. Compared without guidance, both branches move, and what is drawn with it need not get better; yet so
are pictures compared that another generator writes than next-token, by its own loss (`likelihood.py`). Beside it
stand the losses of a mixture, which draw the model back towards true pictures, and - log p(w|c), by the id, lest both
become unlikely together (as in RPO, Pang et al. 2024, arXiv 2404.19733, eq. 2).

A line of the judged file is a prompt (`Document.to_json`), its answers (`Segment.to_json`), and which are right:

    {"prompt": {"segments": [{"role": "user", "text": "two apples"}]},
     "answers": [{"role": "assistant", "image": {"codes": [[5, 7, ..], ..]}}, ..], "right": [true, ..]}

The file refuses to know who gave the answers and who judged them. Shapes: P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigen.likelihood import log_likelihood
from unigen.model import UnifiedModel
from unigen.samplers.guidance import Guidance
from unigen.sequence import Batch, Document, Segment, Tokens, pack
from unigen.training.objectives import Mixture


@dataclass
class PreferenceConfig:
    """judged: the files of answers to compare (`data_tools/judge_answers.py`), apart by commas; none: nothing is
    compared."""

    judged: str | None = None
    beta: float = 0.1
    weight: float = 1.0
    nll: float = 0.3
    """Weight of - log p of the chosen answers, in nats an id."""
    rows: int = 2
    """Rows of pairs beside each row of the mixture."""
    writer: str = "next-token"
    """The generator that drew the pictures."""
    guidance: float = 3.0
    temperature: float = 0.8
    """As next-token drew them."""

    def __post_init__(self) -> None:
        Guidance.of(self.guidance)
        if not self.temperature > 0:
            raise ValueError(f"preferences need a temperature above 0, not {self.temperature}")
        if not (self.beta > 0 and self.weight > 0 and self.nll >= 0 and self.rows >= 1):
            raise ValueError("preferences need beta and weight above 0, nll of at least 0 and at least 1 row of pairs")


def read_pairs(
    files: Sequence[str | Path], seed: int, grid: tuple[int, int], codes: int
) -> list[tuple[Document, Document]]:
    """Pairs of chats that differ in their last segment, a right and a wrong answer, in random order; each answer is
    used at most once.

    grid, codes: rows and columns of a picture, and how many codes there are. Raises ValueError for a file that cannot
    be read, whose pictures are of another tokenizer, or without a prompt that has both."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Document, Document]] = []
    kinds: set[bool] = set()
    for file in files:
        before = len(pairs)
        for judged in read_judged(file, grid, codes):
            right, wrong = ([chats[k] for k in rng.permutation(len(chats))] for chats in judged)
            pairs += zip(right, wrong, strict=False)
            kinds |= {isinstance(picture, Tensor) for chat in (*right, *wrong) for picture in chat.images()}
        if len(pairs) == before:
            raise ValueError(f"{file} has no prompt with a right and a wrong answer: judge more of them")
    if len(kinds) > 1:
        raise ValueError("some judged pictures are codes and others pixels: compare them in runs of their own")
    return [pairs[k] for k in rng.permutation(len(pairs))]


def read_judged(file: str | Path, grid: tuple[int, int], codes: int) -> Iterator[tuple[list[Document], list[Document]]]:
    """The chats of each line whose answers are right, and those whose are wrong. ValueError as in `read_pairs`."""
    read = 0
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                read += 1
                yield _judged(line, grid, codes)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"line {read} of {file} does not hold judged answers: {error}") from error


def _judged(line: str, grid: tuple[int, int], codes: int) -> tuple[list[Document], list[Document]]:
    """The chats of a line whose answers are right, and those whose are wrong."""
    group = json.loads(line)
    prompt = Document.from_json(group["prompt"]).segments
    answers, marks = [Segment.from_json(answer) for answer in group["answers"]], group["right"]
    if len(answers) != len(marks) or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError("each answer is right or not")
    if any(answer.role != "assistant" for answer in answers):
        raise ValueError("the assistant answers")
    for picture in (s.image for s in [*prompt, *answers] if isinstance(s.image, Tensor)):
        if picture.shape != grid:
            raise ValueError(f"a picture is not {grid[0]} x {grid[1]} codes")
        if picture.min() < 0 or picture.max() >= codes:
            raise ValueError(f"codes beyond the {codes} there are")
    chats = [(Document([*prompt, answer]), mark) for answer, mark in zip(answers, marks, strict=True)]
    return [chat for chat, mark in chats if mark], [chat for chat, mark in chats if not mark]


Row = list[tuple[Tokens, Tokens]]
"""Documents, each with its blind rendering; chosen, rejected, chosen, .."""


class ComparedRows:
    """Item i: row i of a mixture, and rows of pairs; a pair comes again only when all have come.

    encode: a document as ids, also blind. length: positions of a row. rows: of pairs, in an item. writer: the generator
    as whose the drawn pictures are laid out. `pairs`: rows of pairs in all.
    """

    def __init__(
        self,
        mixture: Any,
        pairs: Sequence[tuple[Document, Document]],
        encode: Callable[..., Tokens],
        length: int,
        rows: int,
        writer: str = "next-token",
    ) -> None:
        self.mixture, self.rows = mixture, rows
        self.pairs: list[Row] = []
        room = 0
        for pair in pairs:
            options = {"writer": writer} if _draws(pair[0]) else {}
            laid = [encode(document, **options) for document in pair]
            size = sum(map(len, laid))
            if size > length:
                raise ValueError(f"a pair of {size} ids exceeds a row of {length}: raise `length`")
            if size > room:
                self.pairs.append([])
                room = length
            blind = [encode(document, blind=_draws(document), **options) for document in pair]
            self.pairs[-1] += zip(laid, blind, strict=True)
            room -= size

    def __getitem__(self, index: int) -> tuple[Any, list[Row]]:
        return self.mixture[index], [self.pairs[(index * self.rows + k) % len(self.pairs)] for k in range(self.rows)]


def _draws(document: Document) -> bool:
    return document.segments[-1].image is not None


@dataclass
class Compared:
    """mixture: packed documents; pairs: packed answers under their prompts, each chosen before its rejected one; blind:
    the same for the second branch of guidance, which for texts is the first."""

    mixture: Batch
    pairs: Batch
    blind: Batch

    def to(self, device: torch.device | str) -> Compared:
        return Compared(self.mixture.to(device), self.pairs.to(device), self.blind.to(device))

    def pin_memory(self) -> Compared:
        return Compared(self.mixture.pin_memory(), self.pairs.pin_memory(), self.blind.pin_memory())


class CollateCompared:
    def __init__(self, collate: Callable[[list[Any]], Batch], length: int, image_size: int) -> None:
        self.collate, self.length, self.image_size = collate, length, image_size

    def __call__(self, items: list[tuple[Any, list[Row]]]) -> Compared:
        rows = [row for _, rows in items for row in rows]
        seen, blind = ([[both[k] for both in row] for row in rows] for k in (0, 1))
        mixture = self.collate([row for row, _ in items])
        return Compared(mixture, pack(seen, self.length, self.image_size), pack(blind, self.length, self.image_size))


class Preferences(nn.Module):
    """The losses of a mixture, and those of pairs: "preference", and "chosen", - log p of the chosen answers in nats an
    id. metric/accuracy: the share of pairs whose chosen answer has gained on the rejected one."""

    def __init__(self, mixture: Mixture, reference: UnifiedModel, config: PreferenceConfig) -> None:
        super().__init__()
        self.mixture, self.beta = mixture, config.beta
        self.guidance, self.temperature, self.writer = Guidance.of(config.guidance), config.temperature, config.writer
        self.reference = reference.requires_grad_(False).eval()
        self.weights = mixture.weights | {"preference": config.weight, "chosen": config.nll}

    def forward(self, model: Any, batch: Compared, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        losses = self.mixture(model, batch.mixture, rng)
        pairs = model.fill(batch.pairs)
        blind = model.fill(batch.blind) if self.writer == model.template.reader else None
        drawn = pairs, blind, self.guidance, self.temperature, rng
        state = rng.get_state()
        policy_P2 = log_likelihood(model, *drawn).unflatten(0, (-1, 2))
        rng.set_state(state)  # both are asked the same: with one mask, one noise
        with torch.no_grad():
            reference_P2 = log_likelihood(self.reference, *drawn).unflatten(0, (-1, 2))
        gain_P2 = policy_P2 - reference_P2
        margin_P = gain_P2[:, 0] - gain_P2[:, 1]
        counts = self._counts(pairs)
        losses["preference"] = -nn.functional.logsigmoid(self.beta * margin_P).sum(), counts["preference"]
        losses["chosen"] = -policy_P2[:, 0].sum(), counts["chosen"]
        losses["metric/accuracy"] = (margin_P > 0).sum(), counts["metric/accuracy"]
        losses["metric/tokens"] = losses["metric/tokens"][0] + (pairs.segments_BL > 0).sum(), 1
        return losses

    def counts(self, batch: Compared, rng: torch.Generator) -> dict[str, Tensor | int]:
        return self.mixture.counts(batch.mixture, rng) | self._counts(batch.pairs)

    def _counts(self, pairs: Batch) -> dict[str, Tensor | int]:
        count = int(pairs.segments_BL.amax(1).sum()) // 2
        ids = (pairs.loss_BL & (pairs.segments_BL % 2 == 1)).sum()  # a row's documents are 1, 2, ..: odd are chosen
        return {"preference": count, "chosen": ids, "metric/accuracy": count}
