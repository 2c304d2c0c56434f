"""Liquid: a plain language model whose vocabulary is extended by the codes of a VQGAN (Wu et al. 2024,
arXiv 2412.04332).

    <bos>{words} Generate an image based on this description.<boi> 1024 codes <eoi><eos>      a picture
    <bos><unconditional><boi> ...                                                             the unconditional branch
    <bos><start_of_turn>user\n<boi> codes <eoi>\n{question}<end_of_turn>\n<start_of_turn>model\n    an answer

    engine = unigen.load("Junfeng5/Liquid_V1_7B")     # Gemma-7B; Llama and Qwen in this layout work alike

The image tokenizer is Chameleon's, which is not in Liquid's repository: it is looked for in the model's folder
(image_tokenizer/, or vqgan.ckpt), else fetched from the hub. Public weights: not run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unigen.batch import Layout, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.base import Generator
from unigen.generators.next_token import NextToken, Text
from unigen.hub.weights import load_pretrained, silence_transformers
from unigen.media.pixels import center_crop_resize
from unigen.model.template import Output, PretrainedTemplate, UnsupportedError, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import text, vqgan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOI, EOI, UNCOND = "<boi>", "<eoi>", "<unconditional>"
INSTRUCTION = " Generate an image based on this description."
PAD_COLOR = (122, 116, 104)
"""RGB colour of the margins that make an input picture square."""
IMAGE_SIZE = 512
DEFAULT_SAMPLING = {"guidance": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] }}"
    "{{ '<end_of_turn>\n' + ('<eos>' if message['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's turns as Liquid was tuned on them, for tokenizers without a chat template."""
_SEGMENT_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Stands for a segment while a chat is rendered. It is of private-use characters, which no template contains."""


class LiquidTemplate(PretrainedTemplate):
    """Lays out the prompt of an image, or a chat of words and pictures by the tokenizer's chat
    template."""

    supports_system = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_length: int) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with Liquid's tokens. It gets `CHAT_TEMPLATE` where it has Gemma's turns and
                no chat template; without a chat template the model only draws.
            image_length: codes of a picture.
        """
        super().__init__(tokenizer)
        self.image_length = image_length
        vocab = tokenizer.get_vocab()
        ends = [name for name in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", tokenizer.eos_token) if name in vocab]
        self.stop_token_ids = tuple(vocab[name] for name in dict.fromkeys(ends))
        self.image_end_id: int = vocab[EOI]
        self.begin_ids = {self.context_generator: vocab[BOI]}
        if tokenizer.chat_template is None and "<start_of_turn>" in vocab:
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.chat_template is None:
            self.outputs = ("image",)

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: codes in raster order, then EOI."""
        return Layout(grid, suffix=(self.image_end_id,))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Pad a picture to a square with `PAD_COLOR`, then resize it.

        Args:
            image: RGB.
            size: pixels along a side.

        Returns:
            Pixels (size, size, 3), uint8.
        """
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), PAD_COLOR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return center_crop_resize(canvas, size)

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on; see `Template.prompt`.

        Raises:
            UnsupportedError: an image is requested, and the prompt holds more than words.
        """
        if output == "image":
            return self._image_prompt(document.segments, bool(branch)).build()
        return self._chat_prompt(document.segments).build()

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole document for training.

        Args:
            document: where it ends in a picture of the assistant's, the loss is on that picture; else the document is
                a chat, and the loss is on the assistant's answers.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the image.
        """
        last = document.segments[-1]
        if last.image is None or last.role != "assistant":
            return self._chat_prompt(document.segments).build()
        prompt = (
            self._image_prompt(document.segments[:-1], uncond)
            .add_template_text(BOI)
            .add_image(last.image, self.image_length, loss=True)
        )
        return prompt.add_ids([self.image_end_id, self.tokenizer.eos_token_id], loss=True).build()

    def _image_prompt(self, segments: Sequence[Segment], uncond: bool) -> text.PromptBuilder:
        """The words of a picture with the instruction, or the unconditional token."""
        if any(segment.image is not None for segment in segments):
            raise UnsupportedError(
                "liquid generates images from text alone: leave the picture out, or ask for text about it"
            )
        if any(segment.label is not None for segment in segments):
            raise ValueError("liquid generates images from text, not by class: describe the image in words")
        bos = self.tokenizer.bos_token_id
        prompt = text.PromptBuilder(self.tokenizer).add_ids([] if bos is None else [bos])  # Qwen's has none
        if uncond:
            return prompt.add_template_text(UNCOND)
        return prompt.add_user_text(" ".join((segment.text or "").strip() for segment in segments)).add_template_text(
            INSTRUCTION
        )

    def _chat_prompt(self, segments: Sequence[Segment]) -> text.PromptBuilder:
        """Turns in the tokenizer's chat template, with the loss on the assistant's words and the end of its turn."""
        system_text, segments = split_system_messages(segments)
        segments = [Segment(text=system_text, role="system"), *segments] if system_text else segments
        messages: list[dict[str, Any]] = []
        for number, segment in enumerate(segments):
            placeholder = f"\ue000{number}\ue001"
            if messages and messages[-1]["role"] == segment.role:
                messages[-1]["content"] += "\n" + placeholder
            else:
                messages.append({"role": segment.role, "content": placeholder})

        def render(messages: list[dict[str, Any]]) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

        messages = text.merge_system_message(messages, render)
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )
        prompt = text.PromptBuilder(self.tokenizer)
        has_loss = False
        for number, piece in enumerate(_SEGMENT_PLACEHOLDER.split(rendered)):
            if number % 2 == 0:
                turn_end = has_loss and re.match(r"<[^>]+>", piece)
                prompt.add_template_text(piece[: turn_end.end()] if turn_end else "", loss=True).add_template_text(
                    piece[turn_end.end() if turn_end else 0 :]
                )
                continue
            segment = segments[int(piece)]
            has_loss = segment.role == "assistant"
            if segment.image is not None:
                prompt.add_template_text(BOI).add_image(segment.image, self.image_length).add_template_text(EOI)
            elif segment.label is not None:
                raise ValueError("liquid takes text, not classes: describe it in words")
            else:
                prompt.add_user_text((segment.text or "").strip(), loss=has_loss)
        return prompt


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds a causal language model whose tokenizer has Liquid's three tokens.

    Args:
        folder: the model folder, without our unigen.json.
        config: the contents of its config.json, {} where there is none.
    """
    if not str(next(iter(config.get("architectures") or []), "")).endswith("ForCausalLM"):
        return False
    path = folder / "tokenizer.json"
    return path.is_file() and all(f'"{name}"' in path.read_text(encoding="utf-8") for name in (BOI, EOI, UNCOND))


def check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse Liquid on a language model with parts that are not computed here.

    Args:
        folder: the model folder, for the error.
        config: the contents of its config.json.

    Raises:
        ValueError: the model is not supported; the message names those that are.
    """
    from transformers import AutoConfig

    text_config = AutoConfig.for_model(**config).get_text_config()
    has_windows = "sliding_attention" in (getattr(text_config, "layer_types", None) or ())
    logit_cap = getattr(text_config, "final_logit_softcapping", None)
    if has_windows or logit_cap or getattr(text_config, "logit_scale", None) not in (None, 1.0):
        reason = "attends in windows" if has_windows else "caps or scales its logits"
        kind = text_config.model_type
        raise ValueError(
            f"{folder} is Liquid on {kind}, which {reason} and is not supported: Gemma, Llama and Qwen are"
        )


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = text.load(folder)
    image_tokenizer = vqgan.load_chameleon(folder, IMAGE_SIZE)
    lm = load_pretrained(AutoModelForCausalLM, folder, dtype)
    # id(code) = len(tokenizer) + code, even where a table was padded before it was grown
    vocabulary = Vocabulary(len(tokenizer), image_tokenizer.codebook_size)
    if lm.config.vocab_size < vocabulary.size:
        sizes = f"{len(tokenizer)} pieces of text and {image_tokenizer.codebook_size} image codes"
        raise ValueError(f"{folder}: a table of {lm.config.vocab_size} rows does not hold {sizes}")
    height, width = image_tokenizer.grid
    template = LiquidTemplate(tokenizer, height * width)
    generators: dict[str, Generator] = {
        "text": Text(sorted(set(tokenizer.all_special_ids) | {*template.begin_ids.values(), template.image_end_id})),
        "next-token": NextToken(image_tokenizer.grid),
    }
    model = UnifiedModel("liquid", Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, generators)
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    return model


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """The language model itself: codes are further rows of its table."""
    return model.backbone.lm


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, the image tokenizer's beside them.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    with silence_transformers():
        model.backbone.lm.save_pretrained(folder)
    text.save(model.text_tokenizer, folder)
    assert isinstance(model.image_tokenizer, vqgan.VQGAN)
    vqgan.save_public(model.image_tokenizer, folder / "tokenizer")
