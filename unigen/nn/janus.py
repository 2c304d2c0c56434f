"""The backbone of Janus: a language model of text, with a table, an aligner and a head of image codes beside it.

Shapes: B rows, L positions, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unigen.nn.backbone import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class JanusBackbone(Backbone):
    """A language model with a separate table, aligner and head for image codes."""

    def __init__(self, lm: PreTrainedModel, num_codes: int, code_dim: int, head_width: int) -> None:
        """
        Args:
            lm: a `LlamaForCausalLM` of text alone.
            num_codes: codes of the image tokenizer.
            code_dim: width of the table of codes.
            head_width: width of the hidden layer of the head of codes.
        """
        super().__init__(lm)
        self.text_size = int(lm.config.vocab_size)
        self.table = nn.Embedding(num_codes, code_dim)
        self.aligner = nn.Sequential(nn.Linear(code_dim, self.width), nn.GELU(), nn.Linear(self.width, self.width))
        self.head = nn.Sequential(nn.Linear(self.width, head_width), nn.GELU(), nn.Linear(head_width, num_codes))

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D) of ids of text and of codes."""
        codes_BL = ids_BL - self.text_size
        is_code_BL1 = (codes_BL >= 0)[..., None]
        if not is_code_BL1.any():
            return super().embed(ids_BL)
        embeds_BLD = self.aligner(self.table(codes_BL.clamp(min=0)))
        return torch.where(is_code_BL1, embeds_BLD, super().embed(ids_BL.clamp(max=self.text_size - 1)))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Scores of the ids from `start` up to `stop`, which are all of text or all of codes."""
        if start < self.text_size:
            return super().logits(hidden, start, min(stop or self.text_size, self.text_size))
        scores: Tensor = self.head(hidden)
        return scores[..., start - self.text_size : None if stop is None else stop - self.text_size]
