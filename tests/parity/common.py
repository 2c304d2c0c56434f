"""What the parity cases share: rows of the table, random weights, and what the engine computes on its way.

A row compares what our code makes of a checkpoint in the public layout with what the reference makes of it, never the
same module on both sides, and does so once more with a known mistake put in, which must show.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigen.batch import Layout
from unigen.utils.files import save_json

GOLDENS = Path(__file__).parent / "goldens"
MAX_ERROR_SHARE, MIN_CONTROL = 5e-4, 1e-2
"""A row's largest error, as a share of its control, and the least control. float32 sums in another order (another
processor, another number of threads) are at most a tenth of the former apart; a mistake shows at the control's size."""


@dataclass(frozen=True)
class ParityRow:
    """One comparison of ours with the reference, and the same with a known mistake."""

    name: str
    """Printed name."""
    error: float
    """Largest difference, in standard deviations of the reference; of ids, the share that differs."""
    control: float
    """The error with the mistake put in."""
    mistake: str
    """The mistake that the control puts in."""
    reference: str
    """The code that the row is compared with."""
    skip_reason: str = ""
    """Why the row could not be run, empty where it was."""

    @property
    def passed(self) -> bool:
        return not self.skip_reason and self.error <= MAX_ERROR_SHARE * self.control and self.control > MIN_CONTROL


def max_error(ours: Tensor, reference: Tensor) -> float:
    """The largest difference in units of the reference's standard deviation."""
    if ours.shape != reference.shape:
        return float("inf")
    return float((ours.double() - reference.double()).abs().max() / reference.double().std())


def mismatch_share(ours: Sequence[int], reference: Sequence[int]) -> float:
    """The share of ids that are not the same."""
    if len(ours) != len(reference):
        return 1.0
    return sum(a != b for a, b in zip(ours, reference, strict=True)) / len(reference)


def randomize_state(state: Mapping[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random values for every tensor: weights of standard deviation scale / sqrt(fan in), norms around 1, biases of
    0.1. The same whatever the order in which a module makes its tensors."""
    rng = torch.Generator().manual_seed(seed)
    random_state = {}
    for name in sorted(state):
        tensor = state[name]
        noise = torch.randn(tensor.shape, generator=rng)
        if tensor.ndim > 1:
            random_state[name] = noise * scale / max(1, tensor[0].numel()) ** 0.5
        else:
            random_state[name] = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return random_state


@contextmanager
def record_logits(module: Any) -> Iterator[list[Tensor]]:
    """What a generator's module hands to the sampler, after guidance and legality, step after step, (B, V) each."""
    steps: list[Tensor] = []
    sample = module.sample_grouped

    def watched(logits_BV: Tensor, states: Any) -> Any:
        steps.append(logits_BV.clone())
        return sample(logits_BV, states)

    module.sample_grouped = watched
    try:
        yield steps
    finally:
        module.sample_grouped = sample


def official_folder(name: str) -> Path | None:
    """The folder of a family's official repository, where an environment variable names it."""
    folder = os.environ.get(f"UNIGEN_REFERENCE_{name.upper()}")
    return Path(folder) if folder else None


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def byte_level_tokenizer(folder: Path, lines: Sequence[str], specials: Sequence[str], size: int = 400) -> None:
    """A byte-level BPE as DeepSeek's repositories have it: tokenizer.json splits newlines and digits and puts the first
    of `specials` (bos, eos, pad, others) in front; tokenizer_config.json names a class that is not the file's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(specials), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    bos = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{kind}_token": name for kind, name in zip(("bos", "eos", "pad"), specials, strict=False)}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special_tokens = {kind: {"__type": "AddedToken", "content": name} | flags for kind, name in names.items()}
    settings = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "unk_token": None, "add_bos_token": True}
    save_json(folder / "tokenizer_config.json", special_tokens | settings)


class wrong_row_end:  # noqa: N801
    """The mistake of the control: a picture whose rows do not end by their token."""

    def __init__(self, template: Any, row_end: tuple[int, ...]) -> None:
        self.template, self.row_end = template, row_end

    def __enter__(self) -> None:
        layout = self.template.layout
        self.template.layout = lambda grid: Layout(grid, layout(grid).prefix, self.row_end, layout(grid).suffix)

    def __exit__(self, *_: Any) -> None:
        del self.template.layout
