"""Chameleon and Anole: text and image codes in one table, written in any order (Chameleon team 2024, arXiv 2405.09818).

    <s>{words}<reserved08706><racm3:break> 1024 codes <eoss>        a picture, or an answer in text
    <s>{words}...                                                   an answer of text and pictures
    <s><racm3:break> codes <eoss>...                                guidance's branch of pictures
    <s>...                                                          guidance's unconditional branch

    engine = unigen.load("leloy/Anole-7b-v0.1-hf")        # Chameleon's own public weights do not draw
    for part in engine.stream("how to make a paper plane, step by step", output="interleaved"): ...

    l = l_none + s_T (l_full - l_image) + s_I (l_image - l_none)

Codes are tokens of the text vocabulary whose names spell the code: IMGIMGBACZ is 102. transformers' class masks all
image codes and has no decoder of pictures: here its layers are used without its mask, and pictures are decoded by
Chameleon's VQGAN, which is looked for as in Liquid. Public weights: not run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from unigen.batch import Layout, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken, Text
from unigen.hub.weights import load_pretrained, silence_transformers, with_architecture
from unigen.model.template import Output, PretrainedTemplate
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import text, vqgan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unigen.document import SegmentImage
    from unigen.tokenizers import ImageTokenizer

BOI, EOI, EOT = "<racm3:break>", "<eoss>", "<reserved08706>"
CODE_TOKEN = "IMGIMG{}Z"
MASK_LOGITS_KEY = "mask_image_logits"
"""A key that the configs of Lumina-mGPT have and those of transformers have not."""
IMAGE_SIZE = 512
DEFAULT_SAMPLING: dict[str, object] = {"guidance": [3.0, 1.2], "temperature": 0.7, "top_p": 0.9}
TEXT_SAMPLING = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
"""The sampling of text in Anole's scripts."""


def code_token(code: int) -> str:
    """The name of a code's token in the text tokenizer: its digits as letters from A."""
    return CODE_TOKEN.format("".join(chr(ord("A") + int(digit)) for digit in str(code)))


class ChameleonTemplate(PretrainedTemplate):
    """Lays out documents of text and pictures in any order. Guidance has a branch of pictures alone, and an
    unconditional one.
    """

    outputs: tuple[Output, ...] = ("image", "text", "interleaved")
    num_guidance_scales = 2
    special_tokens: tuple[str, ...] = (BOI, EOI, EOT)
    open_turn_outputs: tuple[Output, ...] = ("interleaved",)
    """Outputs whose prompt leaves the user's turn open, as in Anole's scripts."""
    space_around_images = False
    """Whether a space stands between a picture and the words beside it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_length: int) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            image_length: codes of a picture.

        Raises:
            ValueError: the tokenizer lacks special tokens.
        """
        super().__init__(tokenizer)
        vocab = tokenizer.get_vocab()
        if missing := [name for name in self.special_tokens if name not in vocab]:
            raise ValueError(f"the text tokenizer has no {', '.join(missing)}: it is not this family's")
        self.image_length, self.special_ids = image_length, {name: vocab[name] for name in self.special_tokens}
        self.stop_token_ids = (self.special_ids[EOT], tokenizer.eos_token_id)
        self.begin_ids = {self.context_generator: self.special_ids[BOI]}

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: codes in raster order, then EOI."""
        return Layout(grid, suffix=(self.special_ids[EOI],))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize a picture by its shorter side, then crop its centre.

        Args:
            image: RGB.
            size: pixels along a side.

        Returns:
            Pixels (size, size, 3), uint8.
        """
        scale = size / min(image.size)
        width, height = (round(scale * side) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on.

        Args:
            document: the prompt.
            output: the requested output.
            branch: guidance branch: 0 has the whole prompt, 1 the images alone, 2 nothing.
        """
        if branch:
            image_segments = [s for s in document.segments if s.image is not None and branch == 1]
            return self._build_prompt(image_segments, add_turn_ends=False).build()
        prompt = self._build_prompt(document.segments, add_turn_ends=True)
        closes_turn = document.segments[-1].role == "user" and output not in self.open_turn_outputs
        return (prompt.add_template_text(EOT) if closes_turn else prompt).build()

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole document for training.

        Args:
            document: the loss is on what the assistant says and draws.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the image.
        """
        segments = [s for s in document.segments if s.image is not None or not uncond]
        prompt = self._build_prompt(segments, add_turn_ends=not uncond)
        return (
            prompt.add_template_text(EOT, loss=True) if document.segments[-1].role == "assistant" else prompt
        ).build()

    def _build_prompt(
        self, segments: Sequence[Segment], add_turn_ends: bool, add_bos: bool = True
    ) -> text.PromptBuilder:
        """Segments in their order.

        Args:
            segments: of a document.
            add_turn_ends: end a turn with EOT where the role changes.
            add_bos: begin with the tokenizer's begin token.
        """
        prompt = text.PromptBuilder(self.tokenizer, self.special_ids).add_ids(
            [self.tokenizer.bos_token_id] if add_bos else []
        )
        previous = None
        for segment in segments:
            if segment.role == "system":
                raise ValueError("this model follows no system messages: leave them out")
            has_loss = segment.role == "assistant"
            if previous is not None and previous.role == segment.role:
                prompt.add_user_text(
                    " " if self.space_around_images or (previous.text and segment.text) else "", loss=has_loss
                )
            elif previous is not None and add_turn_ends:
                prompt.add_template_text(EOT, loss=not has_loss)
            if segment.image is not None:
                self._add_image(prompt, segment.image, has_loss)
            elif segment.label is not None:
                raise ValueError("this model reads words, not classes: say it in words")
            else:
                prompt.add_user_text((segment.text or "").strip(), loss=has_loss)
            previous = segment
        return prompt

    def _add_image(self, prompt: text.PromptBuilder, image: SegmentImage, loss: bool) -> text.PromptBuilder:
        return (
            prompt.add_template_text(BOI, loss=loss)
            .add_image(image, self.image_length, loss=loss)
            .add_template_text(EOI)
        )


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether config.json, {} where there is none, is that of this family."""
    return config.get("model_type") == "chameleon" and MASK_LOGITS_KEY not in config


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in transformers' layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    from transformers import ChameleonForConditionalGeneration

    tokenizer, image_tokenizer = load_tokenizers(folder)
    lm = load_pretrained(ChameleonForConditionalGeneration, folder, dtype)
    height, width = image_tokenizer.grid
    template = ChameleonTemplate(tokenizer, height * width)
    model = build_chameleon("chameleon", lm, image_tokenizer, template, template.special_ids.values())
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    model.set_default_sampling("text", **TEXT_SAMPLING)
    return model


def load_tokenizers(folder: Path) -> tuple[PreTrainedTokenizerBase, vqgan.VQGAN]:
    """The text tokenizer and the image tokenizer of a folder."""
    return text.load_from_model(folder), vqgan.load_chameleon(folder, IMAGE_SIZE)


def build_chameleon(
    family: str,
    lm: PreTrainedModel,
    image_tokenizer: ImageTokenizer,
    template: ChameleonTemplate,
    specials: Iterable[int],
    row_end: int = 0,
) -> UnifiedModel:
    """Build a model of Chameleon's layers.

    Args:
        family: the name of the family's module.
        lm: a `ChameleonForConditionalGeneration`.
        image_tokenizer: Chameleon's VQGAN.
        template: of the family, with its text tokenizer.
        specials: ids that no text contains, beside the special ids of the tokenizer.
        row_end: ids after each row of codes.

    Raises:
        ValueError: the names or ids of the codes are not Chameleon's.
    """
    tokenizer = template.tokenizer
    names, vocab = [code_token(code) for code in range(image_tokenizer.codebook_size)], tokenizer.get_vocab()
    if missing := [name for name in names if name not in vocab]:
        raise ValueError(f"the text tokenizer lacks {len(missing)} image codes, {missing[0]} among them")
    ids = [vocab[name] for name in names]
    first_id = min(ids)
    if max(ids) - first_id + 1 != len(ids):
        raise ValueError("the ids of the image codes are not in a row")
    order = tuple(torch.tensor(ids).argsort().tolist())
    vocabulary = Vocabulary(lm.config.vocab_size, len(ids), first_id, order)
    generators: dict[str, Generator] = {
        "text": Text(sorted({*tokenizer.all_special_ids, *specials} - set(ids))),
        "next-token": NextToken(image_tokenizer.grid, row_end),
    }
    return UnifiedModel(family, Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, generators)


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """The whole language model, for the class of ours that vLLM finds by this name (`unigen.backends.vllm_models`)."""
    return with_architecture(model.backbone.lm, "UnigenChameleonForCausalLM")


def save_public(model: UnifiedModel, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the files of transformers' layout, and Chameleon's image tokenizer beside them.

    Args:
        model: of this family, or of one with its layers.
        folder: exists and is empty.
        state: the tensors of the language model, where they differ from its own.
    """
    assert isinstance(model.image_tokenizer, vqgan.VQGAN)
    with silence_transformers():
        model.backbone.lm.save_pretrained(folder, state_dict=state)
    text.save(model.text_tokenizer, folder)
    vqgan.save_public(model.image_tokenizer, folder / "tokenizer")
