"""Backbones of LlamaGen: a Llama over image codes, with two-dimensional rotary positions and a class or a prompt as its
condition.

Shapes: B rows, L positions, D width, E head width, F width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_THETA = 10_000.0


class Rotary2D(nn.Module):
    """cos and sin (B, L, E) of positions. Position 0 is the condition, 1 + i is code i in raster order.

    Both are zero for the condition. With theta_p = base^(-2p / (E/2)), p = 0 .. E/4 - 1, pair p rotates by
    row theta_p, and pair E/4 + p by column theta_p.
    """

    def __init__(self, side: int, width: int) -> None:
        """
        Args:
            side: rows, and columns, of codes.
            width: of a head.
        """
        super().__init__()
        half_width = width // 2
        theta = ROPE_THETA ** (-torch.arange(0, half_width, 2).float() / half_width)
        angles_by_index = torch.outer(torch.arange(side).float(), theta)  # (side, E/4)
        rows, columns = angles_by_index[:, None].expand(-1, side, -1), angles_by_index[None].expand(side, -1, -1)
        angles = torch.cat((rows, columns), -1).flatten(0, 1)  # (side * side, E/2)
        angles = torch.cat((angles, angles), -1)
        zeros = torch.zeros(1, width)
        self.register_buffer("cos", torch.cat((zeros, angles.cos())), persistent=False)
        self.register_buffer("sin", torch.cat((zeros, angles.sin())), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @torch.no_grad()
    def forward(self, x_BLD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embeddings as transformers' Llama asks for them.

        Args:
            x_BLD: gives the dtype.
            position_ids: (B, L).
        """
        positions_BL = position_ids.clamp(max=len(self.cos) - 1)  # rows that are finished still take part in a step
        return self.cos[positions_BL].to(x_BLD.dtype), self.sin[positions_BL].to(x_BLD.dtype)


class LlamaGenBackbone(Backbone):
    """A Llama whose embedding table and head hold codes alone. Ids of the condition precede those of codes."""

    def __init__(self, lm: PreTrainedModel, num_condition_ids: int, side: int) -> None:
        """
        Args:
            lm: a `LlamaForCausalLM`; its rotary embeddings are replaced.
            num_condition_ids: ids of the condition.
            side: rows, and columns, of codes.
        """
        super().__init__(lm)
        self.num_condition_ids = num_condition_ids
        lm.model.rotary_emb = Rotary2D(side, lm.config.head_dim)

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D) of ids of the condition; of codes any value."""
        raise TypeError("a backbone of LlamaGen's defines condition()")

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D) of ids of the condition and of codes."""
        codes_BL = ids_BL - self.num_condition_ids
        table = self.lm.get_input_embeddings()
        if bool((codes_BL >= 0).all()):
            return table(codes_BL)  # type: ignore[no-any-return]
        return torch.where((codes_BL >= 0)[..., None], table(codes_BL.clamp(min=0)), self.embed_condition(ids_BL))

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Scores of the ids from `start` up to `stop`, which are ids of codes."""
        return super().logits(
            hidden, max(0, start - self.num_condition_ids), None if stop is None else stop - self.num_condition_ids
        )


class ClassBackbone(LlamaGenBackbone):
    """A backbone whose condition is a class."""

    def __init__(self, lm: PreTrainedModel, classes: int, side: int) -> None:
        super().__init__(lm, classes, side)
        self.classes = nn.Embedding(classes, self.width)

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D) of classes; of codes any value."""
        return self.classes(ids_BL.clamp(max=self.num_condition_ids - 1))  # type: ignore[no-any-return]


class TextBackbone(LlamaGenBackbone):
    """A backbone whose condition is a prompt, encoded by T5 and projected to the Llama by two layers. T5 is frozen.

    The ids before the codes are T5's pieces, and then those of the vectors of the unconditional branch. Each prompt is
    encoded up to its end.
    """

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"wordless": "uncond_embedding", "project": "text_proj"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, lm: PreTrainedModel, settings: Mapping[str, Any], max_prompt_length: int, side: int) -> None:
        """
        Args:
            lm: a `LlamaForCausalLM`; its rotary embeddings are replaced.
            settings: T5's config.
            max_prompt_length: the most ids of a prompt, and the number of unconditional vectors.
            side: rows, and columns, of codes.

        Raises:
            ValueError: the config of T5 has no end id.
        """
        from transformers import T5Config, T5EncoderModel

        config = T5Config(**{**settings, "dropout_rate": 0.0})
        if not isinstance(config.eos_token_id, int):
            raise ValueError(f"the config of T5 has no id of its end (eos_token_id): {config.eos_token_id!r}")
        self.text_vocab_size, self.max_prompt_length = config.vocab_size, max_prompt_length
        self.eos_id, self.num_codes = config.eos_token_id, side * side
        super().__init__(lm, self.text_vocab_size + max_prompt_length, side)
        self.encoder = T5EncoderModel(config).encoder.requires_grad_(False)
        self.uncond_embedding = nn.Embedding(max_prompt_length, config.d_model).requires_grad_(False)
        self.text_proj = nn.Sequential(
            nn.Linear(config.d_model, self.width, bias=False),
            nn.GELU("tanh"),
            nn.Linear(self.width, self.width, bias=False),
        )

    def embed_condition(self, ids_BL: Tensor) -> Tensor:
        """Projected features (B, L, D) of prompts and unconditional vectors; of codes any value."""
        features_BLF = self.uncond_embedding((ids_BL - self.text_vocab_size).clamp(0, self.max_prompt_length - 1))
        for row, start, stop in self.prompt_spans(ids_BL):
            encoded_1LF = self.encoder(input_ids=ids_BL[row : row + 1, start:stop]).last_hidden_state
            features_BLF[row, start:stop] = encoded_1LF[0].to(features_BLF.dtype)
        return self.text_proj(features_BLF)  # type: ignore[no-any-return]

    def prompt_spans(self, ids_BL: Tensor) -> Iterator[tuple[int, int, int]]:
        """Row, start and stop of each run of pieces that has an end. A run without one is padding."""
        for row, ids in enumerate(ids_BL.tolist()):
            start = 0
            for index, id in enumerate(ids):
                if id == self.eos_id:
                    yield row, start, index + 1
                if id == self.eos_id or id >= self.text_vocab_size:
                    start = index + 1

    def forward_cached(
        self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) of a step, with codes counted from the end of their prompt.

        The prompt is what a slot held when it was first read again; its length is kept in `cache.slot_state`.
        """
        assert cache is not None
        for row, length in zip(cache.step.slots, cache.step.lengths, strict=True):
            if length:
                cache.slot_state.setdefault(row, torch.tensor(length))
        step_length = torch.tensor(positions_BL.shape[1])  # a prompt that is read in this step ends with it
        prompt_lengths_B = torch.stack([cache.slot_state.get(row, step_length) for row in cache.step.slots]).to(
            positions_BL.device
        )
        code_positions_BL = (positions_BL - prompt_lengths_B[:, None] + 1).clamp(min=0)
        return super().forward_cached(embeds_BLD, code_positions_BL, mask, cache)

    def forward_packed(
        self, embeds_BLD: Tensor, positions_BL: Tensor, segments_BL: Tensor, attend_until_BL: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, L, D) of packed documents that end in a whole picture."""
        lengths_BL = (segments_BL[:, :, None] == segments_BL[:, None]).sum(-1)
        code_positions_BL = (positions_BL - lengths_BL + self.num_codes + 1).clamp(min=0)
        return super().forward_packed(embeds_BLD, code_positions_BL, segments_BL, attend_until_BL)
