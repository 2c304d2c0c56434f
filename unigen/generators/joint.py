"""Joint masked prediction: a text and an image at once (UniD3, MMaDA), by the sampler of masked.py.

    begin, 32 positions of text, then the codes, all of which see each other; the text is padded with ends of turn
    loss = - E mean over the masked text of log p  -  E mean over the masked codes of log p

Hu et al. 2023 (UniD3, arXiv 2211.14842) and Yang et al. 2025 (MMaDA, arXiv 2505.15809) mask both kinds of ids at one
rate. Here each has its own rate, and one of them is often given or fully masked, as in UniDiffuser for noise (Bao et
al. 2023, arXiv 2303.06555): one model writes an image for a text, a text for an image, or both from nothing. The
unconditional branch of guidance reads a masked text; guidance applies to the codes only.
Does not depend on: templates, tokenizers, caches.

Shapes: M images, N positions of a part, V ids of a part's vocabulary.
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
"""Probability in training that a part is given, and that it is fully masked."""


class Joint(Masked):
    """A text and the codes of its image."""

    name = "joint"
    text_length = TEXT_LENGTH

    def __init__(self, grid: tuple[int, int], mask_id: int, special_ids: tuple[int, ...] = ()) -> None:
        """A generator for one size of images.

        Args:
            grid: rows and columns of codes.
            mask_id: the id of a masked position.
            special_ids: ids that do not occur in text. The end of a turn, with which text is padded, is not one of
                them.
        """
        super().__init__(grid, mask_id)
        self.special_ids = special_ids

    @classmethod
    def from_context(cls, context: BuildContext) -> Joint:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.
        """
        return cls(context.grid, context.mask_id, context.special_ids)

    def part_slices(self) -> list[slice]:
        """See `Masked.part_slices`: the text, then the codes."""
        return [slice(0, self.text_length), slice(self.text_length, self.num_positions())]

    def vocab_slice(self, part: int, vocabulary: Vocabulary) -> slice:
        """See `Masked.vocab_slice`: ids of text, then ids of codes."""
        return super().vocab_slice(part, vocabulary) if part else slice(0, vocabulary.text_size)

    def mask_forbidden(self, logits_NV: Tensor) -> Tensor:
        """See `Masked.mask_forbidden`: special ids are left out."""
        logits_NV = logits_NV.clone()
        logits_NV[:, list(self.special_ids)] = -math.inf
        return logits_NV

    def mask_ratios(self, count: int, rng: torch.Generator) -> Tensor:
        """See `Masked.mask_ratios`: ratios (M, 2) of text and codes. Where both would be given, codes are masked."""
        sampled_M2 = torch.cos(math.pi / 2 * torch.rand(count, 2, generator=rng))
        kind_M2 = torch.rand(count, 2, generator=rng)
        ratios_M2 = torch.where(
            kind_M2 < FULL_MASK_PROB, 0.0, torch.where(kind_M2 > 1 - FULL_MASK_PROB, 1.0, sampled_M2)
        )
        ratios_M2[:, 1] = torch.where(ratios_M2.amax(1) > 0, ratios_M2[:, 1], sampled_M2[:, 1])
        return ratios_M2


GENERATOR = Joint
