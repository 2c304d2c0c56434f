"""Joint masked prediction: a text and an image at once (UniD3, MMaDA), by the sampler of masked.py.

    begin, 32 positions of text, then the codes, all of these seeing each other; ends of turn fill up the text
    loss = - E mean over the masked text of log p  -  E mean over the masked codes of log p

Hu et al. 2023 (UniD3, arXiv 2211.14842) and Yang et al. 2025 (MMaDA, arXiv 2505.15809) mask both kinds of ids at one
rate; here each has a rate of its own, and one or the other is often given or wholly masked, as UniDiffuser has it of
noise (Bao et al. 2023, arXiv 2303.06555): so one model writes an image to a text, a text to an image, and both from
nothing. The blind branch of guidance reads the text masked; it counts for the codes alone.
Does not depend on: templates, tokenizers, caches.

Shapes: M images, N positions of a part, V rows of the table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unigen.batch import Vocabulary
from unigen.generators.base import BuildContext
from unigen.generators.masked import Masked

TEXT_LENGTH = 32
FULL_MASK_PROB = 0.25
"""In training, how often a part is given, and how often it is masked as a whole."""


class Joint(Masked):
    """The text of a picture and its codes."""

    name = "joint"
    text_length = TEXT_LENGTH

    def __init__(self, grid: tuple[int, int], mask_id: int, special_ids: tuple[int, ...] = ()) -> None:
        """special_ids: the ids that no text holds; the end of a turn, which fills it up, is none of them."""
        super().__init__(grid, mask_id)
        self.special_ids = special_ids

    @classmethod
    def from_context(cls, context: BuildContext) -> Joint:
        return cls(context.grid, context.mask_id, context.special_ids)

    def part_slices(self) -> list[slice]:
        return [slice(0, self.text_length), slice(self.text_length, self.num_positions())]

    def vocab_slice(self, part: int, vocabulary: Vocabulary) -> slice:
        return super().vocab_slice(part, vocabulary) if part else slice(0, vocabulary.text_size)

    def mask_forbidden(self, logits_NV: Tensor) -> Tensor:
        logits_NV = logits_NV.clone()
        logits_NV[:, list(self.special_ids)] = -math.inf
        return logits_NV

    def mask_ratios(self, count: int, rng: torch.Generator) -> Tensor:
        """(M, 2), of text and codes; where both would be given, the codes are masked."""
        sampled_M2 = torch.cos(math.pi / 2 * torch.rand(count, 2, generator=rng))
        kind_M2 = torch.rand(count, 2, generator=rng)
        ratios_M2 = torch.where(
            kind_M2 < FULL_MASK_PROB, 0.0, torch.where(kind_M2 > 1 - FULL_MASK_PROB, 1.0, sampled_M2)
        )
        ratios_M2[:, 1] = torch.where(ratios_M2.amax(1) > 0, ratios_M2[:, 1], sampled_M2[:, 1])
        return ratios_M2


GENERATOR = Joint
