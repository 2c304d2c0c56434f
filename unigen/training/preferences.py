"""Preference optimization (DPO): of two answers to one prompt, the right one is to become likelier.

    L = - E log sigmoid(beta [ log p(w|c) - log p_ref(w|c)  -  log p(l|c) + log p_ref(l|c) ])

is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) with w chosen, l rejected, c the prompt and p_ref the model at
the start of training. An answer is a picture or a text, and log p is the sum over its ids. p is the distribution that
answers are sampled from: for text the prediction itself; for codes of next-token and next-scale the prediction after
guidance and temperature, softmax((u + s (c - u)) / T) with the unconditional branch u. A likelihood without guidance
would move both branches, and what is sampled with guidance need not get better. Pictures of other generators are
nevertheless compared without it, by the generator's own loss (`inference/scoring.py`). Two more terms are added: the
losses of a mixture, which draw the model back towards true pictures, and - log p(w|c) per id, which keeps both answers
from becoming unlikely together (as in RPO, Pang et al. 2024, arXiv 2404.19733, eq. 2).

A line of a judged file has a prompt (`Document.to_json`), its answers (`Segment.to_json`), which of them are correct,
and for pictures the generator that they are trained for, next-token if none is named. Pictures are codes of the model's
image tokenizer, or for next-scale its own codes in a row; except for next-token and the like they may be pixels. The
keys of version 0.1, "right" for "correct" and "writer" for "generator", are read, too:

    {"prompt": {"segments": [{"role": "user", "text": "two apples"}]}, "generator": "masked",
     "answers": [{"role": "assistant", "image": {"codes": [[5, 7, ..], ..]}}, ..], "correct": [true, ..]}

Does not depend on: who gave the answers, who judged them. Shapes: P pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unigen import generators
from unigen.batch import Batch, Tokens, pack
from unigen.document import Document, Segment
from unigen.inference.scoring import has_guided_likelihood, log_likelihood
from unigen.model.unified import UnifiedModel
from unigen.options import DEFAULT_GENERATOR
from unigen.samplers.guidance import Guidance
from unigen.training.objectives import MultiGeneratorLoss

if TYPE_CHECKING:
    from _typeshed import SupportsGetItem


@dataclass
class PreferenceConfig:
    """Comparisons beside the losses of a mixture."""

    RENAMED: ClassVar[dict[str, str]] = {"judged": "answers", "nll": "nll_weight", "rows": "rows_per_sample"}
    """Keys of version 0.1, and their names now."""

    answers: str | None = None
    """Files of judged answers (`data_tools/judge_answers.py`), apart by commas; none: nothing is compared."""
    beta: float = 0.1
    """The factor in the loss; above 0."""
    weight: float = 1.0
    """Weight of the loss of comparisons; above 0."""
    nll_weight: float = 0.3
    """Weight of - log p of the chosen answers, in nats an id."""
    rows_per_sample: int = 1
    """Rows of pairs of each kind beside each row of the mixture."""
    guidance: float = 3.0
    """As the codes of next-token and next-scale were drawn."""
    temperature: float = 0.8
    """As the codes of next-token and next-scale were drawn; above 0."""

    def __post_init__(self) -> None:
        Guidance.from_value(self.guidance)
        if not self.temperature > 0:
            raise ValueError(f"preferences need a temperature above 0, not {self.temperature}")
        if not (self.beta > 0 and self.weight > 0 and self.nll_weight >= 0 and self.rows_per_sample >= 1):
            raise ValueError(
                "preferences need beta and weight above 0, nll_weight of at least 0 and at least 1 row of pairs"
            )


NativeCodeShapes = Mapping[str, tuple[int, int]]
"""For generators with codes of their own, by name: codes of an image, and size of the codebook."""


class JudgedAnswers(NamedTuple):
    """The chats of one prompt, each with one answer."""

    correct: list[Document]
    """Chats whose answer is right."""
    incorrect: list[Document]
    """Chats whose answer is wrong."""
    generator: str
    """Name of the generator that answers which are images are trained for."""


class PreferencePair(NamedTuple):
    """Two chats that differ in their last segment."""

    chosen: Document
    """The chat whose answer is right."""
    rejected: Document
    """The chat whose answer is wrong."""
    generator: str = DEFAULT_GENERATOR
    """Name of the generator that answers which are images are trained for."""


def read_pairs(
    files: Sequence[str | Path],
    seed: int,
    grid: tuple[int, int],
    codes: int,
    native_codes: NativeCodeShapes | None = None,
) -> list[PreferencePair]:
    """Read pairs of a right and a wrong answer to one prompt. Each answer is used at most once.

    Args:
        files: of judged answers.
        seed: of the order of the pairs, and of which answers make a pair.
        grid: rows and columns of codes of a picture.
        codes: size of the codebook.
        native_codes: the same for generators with codes of their own.

    Returns:
        The pairs in random order.

    Raises:
        ValueError: a file cannot be read, its pictures are of another tokenizer, or none of its prompts has both.
    """
    rng = np.random.default_rng(seed)
    pairs: list[PreferencePair] = []
    for file in files:
        before = len(pairs)
        for record in read_judged_answers(file, grid, codes, native_codes):
            correct, incorrect = ([chats[k] for k in rng.permutation(len(chats))] for chats in record[:2])
            pairs += [PreferencePair(*sides, record.generator) for sides in zip(correct, incorrect, strict=False)]
        if len(pairs) == before:
            raise ValueError(f"{file} has no prompt with a right and a wrong answer: judge more of them")
    return [pairs[k] for k in rng.permutation(len(pairs))]


def read_judged_answers(
    file: str | Path, grid: tuple[int, int], codes: int, native_codes: NativeCodeShapes | None = None
) -> Iterator[JudgedAnswers]:
    """Read a judged file line by line.

    Args:
        file: of judged answers.
        grid: rows and columns of codes of a picture.
        codes: size of the codebook.
        native_codes: the same for generators with codes of their own.

    Yields:
        The answers of each line.

    Raises:
        ValueError: the file cannot be read, or its pictures are of another tokenizer; with the line.
    """
    line_number = 0
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                line_number += 1
                yield _parse_judged_line(line, grid, codes, native_codes or {})
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"line {line_number} of {file} does not hold judged answers: {error}") from error


def _parse_judged_line(line: str, grid: tuple[int, int], codes: int, native_codes: NativeCodeShapes) -> JudgedAnswers:
    record = json.loads(line)
    prompt = Document.from_json(record["prompt"]).segments
    answers = [Segment.from_json(answer) for answer in record["answers"]]
    is_correct = record["correct"] if "correct" in record else record["right"]
    if len(answers) != len(is_correct) or not all(isinstance(mark, bool) for mark in is_correct):
        raise ValueError("each answer is right or not")
    if any(answer.role != "assistant" for answer in answers):
        raise ValueError("the assistant answers")
    generator_name = record.get("generator", record.get("writer", DEFAULT_GENERATOR))
    generator = generators.find_generator(generator_name).name
    pictures = [s.image for s in [*prompt, *answers] if s.image is not None]
    if len({picture.ndim if isinstance(picture, Tensor) else 0 for picture in pictures}) > 1:
        raise ValueError(
            "its pictures are of several kinds: give all as codes, as the generator's own codes or as pixels"
        )
    for picture in (picture for picture in pictures if isinstance(picture, Tensor)):
        if picture.ndim == 1 and generator not in native_codes:
            raise ValueError(f"codes of {generator}'s own are for comparisons, of a model that has it")
        if picture.ndim == 2 and generator in native_codes:
            raise ValueError(f"pictures by {generator} are compared by its own codes, or as pixels")
        length, size = native_codes[generator] if picture.ndim == 1 else (0, codes)
        if picture.shape != ((length,) if length else grid):
            raise ValueError(f"a picture is not {length or f'{grid[0]} x {grid[1]}'} codes")
        if picture.min() < 0 or picture.max() >= size:
            raise ValueError(f"codes beyond the {size} there are")
    chats = [(Document([*prompt, answer]), mark) for answer, mark in zip(answers, is_correct, strict=True)]
    return JudgedAnswers([chat for chat, mark in chats if mark], [chat for chat, mark in chats if not mark], generator)


class PairBatch(NamedTuple):
    """The two chats of a pair as ids (`Tokens`), or those of many pairs, packed in one order (`Batch`)."""

    chosen: Any
    """The chat whose answer is right."""
    rejected: Any
    """The chat whose answer is wrong."""
    uncond_chosen: Any
    """`chosen` for the unconditional branch of guidance; for a text the same as `chosen`."""
    uncond_rejected: Any
    """`rejected` for the unconditional branch."""


class PreferenceDataset:
    """Item i is row i of a mixture, and beside it rows of pairs of each kind.

    The kinds are: pictures in the model's codes and texts, pixels, a generator's own codes. A pair comes again only
    when all of its kind have come. `pair_rows` has the rows of pairs by kind.

    Args:
        dataset: the mixture.
        pairs: the pairs.
        encode: encodes a document as ids, with or without its condition.
        length: positions of a row, which holds either side of its pairs.
        rows: rows of pairs of each kind in an item.

    Raises:
        ValueError: an answer is longer than a row.
    """

    def __init__(
        self,
        dataset: SupportsGetItem[int, object],
        pairs: Sequence[PreferencePair],
        encode: Callable[..., Tokens],
        length: int,
        rows: int,
    ) -> None:
        self.dataset, self.rows = dataset, rows
        kinds: dict[str, list[PreferencePair]] = {}
        for pair in pairs:
            kinds.setdefault(_pair_kind(pair), []).append(pair)
        self.pair_rows = [_pack_pairs(kinds[name], encode, length) for name in sorted(kinds)]

    def __getitem__(self, index: int) -> tuple[object, list[list[list[PairBatch]]]]:
        row_indices = range(index * self.rows, (index + 1) * self.rows)
        return self.dataset[index], [[rows[k % len(rows)] for k in row_indices] for rows in self.pair_rows]


def _pack_pairs(pairs: Sequence[PreferencePair], encode: Callable[..., Tokens], length: int) -> list[list[PairBatch]]:
    """Put pairs into rows of `length` positions, in their order."""
    rows: list[list[PairBatch]] = []
    free_length = 0
    for pair in pairs:
        is_image = pair.chosen.segments[-1].image is not None
        options = {"generator": pair.generator} if is_image else {}
        sides = [encode(chat, uncond=uncond, **options) for uncond in (False, is_image) for chat in pair[:2]]
        size = max(map(len, sides))
        if size > length:
            raise ValueError(f"an answer of {size} ids exceeds a row of {length}: raise `length`")
        if size > free_length:
            rows.append([])
            free_length = length
        rows[-1].append(PairBatch(*sides))
        free_length -= size
    return rows


def _pair_kind(pair: PreferencePair) -> str:
    """Return the kind of a pair; pairs of one kind make one batch."""
    pictures = [picture for chat in pair[:2] for picture in chat.images()]
    codes = [picture for picture in pictures if isinstance(picture, Tensor)]
    if len(codes) < len(pictures):
        return "pixels"
    return f"codes of {pair.generator}" if any(image_codes.ndim == 1 for image_codes in codes) else "codes"


@dataclass
class PreferenceBatch:
    """Packed documents, and packed pairs beside them."""

    documents: Batch
    """Rows of the mixture."""
    pairs_by_kind: list[PairBatch]
    """The pairs of each kind: pair k is document k of each side."""

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """Move the tensors to a device."""
        return PreferenceBatch(
            self.documents.to(device), [PairBatch(*(side.to(device) for side in kind)) for kind in self.pairs_by_kind]
        )

    def pin_memory(self) -> PreferenceBatch:
        """Copy the tensors to memory from which a GPU copies."""
        return PreferenceBatch(
            self.documents.pin_memory(), [PairBatch(*(s.pin_memory() for s in kind)) for kind in self.pairs_by_kind]
        )


class PreferenceCollator:
    """Makes batches of the items of a `PreferenceDataset`.

    Args:
        collate: makes a batch of rows of the mixture.
        length: positions of a row.
        image_size: pixels along a side of pictures.
    """

    def __init__(self, collate: Callable[[list[Any]], Batch], length: int, image_size: int) -> None:
        self.collate, self.length, self.image_size = collate, length, image_size

    def __call__(self, items: list[tuple[object, list[list[list[PairBatch]]]]]) -> PreferenceBatch:
        """Pack items.

        Args:
            items: rows of the mixture, each with rows of pairs by kind.

        Returns:
            The batch, on the CPU.
        """
        kinds = [[row for rows in kind for row in rows] for kind in zip(*(kinds for _, kinds in items), strict=True)]
        return PreferenceBatch(self.collate([row for row, _ in items]), [self._pack(rows) for rows in kinds])

    def _pack(self, rows: list[list[PairBatch]]) -> PairBatch:
        sides = ([[pair[k] for pair in row] for row in rows] for k in range(len(PairBatch._fields)))
        return PairBatch(*(pack(side, self.length, self.image_size) for side in sides))


class DPOObjective(nn.Module):
    """The losses of a mixture and of pairs.

    "preference" is the loss of DPO; "chosen" is - log p of the chosen answers, in nats per id; "metric/accuracy" is the
    share of pairs whose chosen answer has gained on the rejected one.

    Args:
        base_loss: the losses of the mixture.
        reference: the model at the start of training; it is frozen.
        config: beta, weights, guidance and temperature.
    """

    def __init__(self, base_loss: MultiGeneratorLoss, reference: UnifiedModel, config: PreferenceConfig) -> None:
        super().__init__()
        self.base_loss, self.beta = base_loss, config.beta
        self.guidance, self.temperature = Guidance.from_value(config.guidance), config.temperature
        self.reference = reference.requires_grad_(False).eval()
        self.weights = base_loss.weights | {"preference": config.weight, "chosen": config.nll_weight}

    def forward(
        self, model: UnifiedModel, batch: PreferenceBatch, rng: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Compute the losses of a batch.

        Args:
            model: the model that is trained.
            batch: on the model's device.
            rng: draws masks, noise and times, on the CPU.

        Returns:
            Name -> (sum, count).
        """
        losses = self.base_loss(model, batch.documents, rng)
        likelihoods = [self._likelihoods(model, kind, rng) for kind in batch.pairs_by_kind]
        chosen_P, margin_P = (torch.cat(parts) for parts in zip(*likelihoods, strict=True))
        counts = self._counts(batch)
        losses["preference"] = -nn.functional.logsigmoid(self.beta * margin_P).sum(), counts["preference"]
        losses["chosen"] = -chosen_P.sum(), counts["chosen"]
        losses["metric/accuracy"] = (margin_P > 0).sum(), counts["metric/accuracy"]
        num_tokens = sum((side.segments_BL > 0).sum() for kind in batch.pairs_by_kind for side in kind[:2])
        losses["metric/tokens"] = losses["metric/tokens"][0] + num_tokens, 1
        return losses

    def counts(self, batch: PreferenceBatch, rng: torch.Generator) -> dict[str, Tensor | int]:
        """Count the targets of each loss, without running the model.

        Args:
            batch: the batch.
            rng: not used.

        Returns:
            Name -> count.
        """
        return self.base_loss.counts(batch.documents, rng) | self._counts(batch)

    def _likelihoods(self, model: UnifiedModel, pairs: PairBatch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return log p of the chosen answers (P,), and the margins (P,), as in the module's equation without beta."""
        state = rng.get_state()

        def log_p(model: UnifiedModel, side: Batch, uncond: Batch) -> Tensor:
            rng.set_state(state)  # the same masks, noise and times for both answers and both models
            uncond_batch = model.insert_image_ids(uncond) if has_guided_likelihood(model, side) else None
            return log_likelihood(
                model, model.insert_image_ids(side), uncond_batch, self.guidance, self.temperature, rng
            )

        sides = (pairs.chosen, pairs.uncond_chosen), (pairs.rejected, pairs.uncond_rejected)
        chosen_P, rejected_P = (log_p(model, *side) for side in sides)
        with torch.no_grad():
            chosen_ref_P, rejected_ref_P = (log_p(self.reference, *side) for side in sides)
        return chosen_P, (chosen_P - chosen_ref_P) - (rejected_P - rejected_ref_P)

    def _counts(self, batch: PreferenceBatch) -> dict[str, Tensor | int]:
        chosen = [kind.chosen for kind in batch.pairs_by_kind]
        count = sum(int(side.segments_BL.amax(1).sum()) for side in chosen)
        empty = torch.stack([(side.spans_N3[:, 1] == side.spans_N3[:, 2]).sum() for side in chosen]).sum()
        ids = torch.stack([side.loss_BL.sum() for side in chosen]).sum()
        codes = math.prod(self.reference.image_tokenizer.grid)  # the count of a picture without positions
        return {"preference": count, "chosen": ids + codes * empty, "metric/accuracy": count}
