"""Liquid: a plain language model whose vocabulary goes on with the codes of a VQGAN (Wu et al. 2024, arXiv 2412.04332).

    <bos>{words} Generate an image based on this description.<boi> 1024 codes <eoi><eos>      a picture
    <bos><unconditional><boi> ...                                                             guidance's other branch
    <bos><start_of_turn>user\n<boi> codes <eoi>\n{question}<end_of_turn>\n<start_of_turn>model\n    an answer

    engine = unigen.load("Junfeng5/Liquid_V1_7B")     # Gemma-7B; Llama and Qwen in this layout work alike

The image tokenizer is Chameleon's, which is not in Liquid's repository: it is looked for in the model's folder
(image_tokenizer/, or vqgan.ckpt), else fetched from the hub. Public weights: not run here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from unigen.tokenizers import text, vqgan

BOI, EOI, UNCOND = "<boi>", "<eoi>", "<unconditional>"
INSTRUCTION = " Generate an image based on this description."
PAD_COLOR = (122, 116, 104)
"""What a picture to be read is laid on to make it square."""
IMAGE_SIZE = 512
DEFAULT_SAMPLING = {"guidance": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] }}"
    "{{ '<end_of_turn>\n' + ('<eos>' if message['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's turns as Liquid was tuned on them, for tokenizers that bring no chat template."""
_SEGMENT_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Stands for a segment while a chat is rendered: private characters, that no template holds."""


class LiquidTemplate(PretrainedTemplate):
    """Pictures are drawn from words alone; answers are given to a chat of words and pictures."""

    supports_system = True

    def __init__(self, tokenizer: Any, image_length: int) -> None:
        super().__init__(tokenizer)
        self.image_length = image_length
        known = tokenizer.get_vocab()
        ends = [name for name in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", tokenizer.eos_token) if name in known]
        self.stop_token_ids = tuple(known[name] for name in dict.fromkeys(ends))
        self.image_end_id: int = known[EOI]
        self.begin_ids = {self.context_generator: known[BOI]}
        if tokenizer.chat_template is None and "<start_of_turn>" in known:
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.chat_template is None:
            self.outputs = ("image",)

    def layout(self, grid: tuple[int, int]) -> Layout:
        return Layout(grid, suffix=(self.image_end_id,))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """The whole picture on a square of `PAD_COLOR`, resized."""
        side = max(image.size)
        paper = Image.new("RGB", (side, side), PAD_COLOR)
        paper.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return center_crop_resize(paper, size)

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        if output == "image":
            return self._image_prompt(document.segments, bool(branch)).build()
        return self._chat_prompt(document.segments).build()

    def encode(self, document: Document, *, uncond: bool = False, generator: str = "next-token") -> Tokens:
        """A whole document to learn from: one that ends in a picture of the assistant's, with the words that it is
        drawn from; else a chat, of which the assistant's answers are learnt."""
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
        if any(segment.image is not None for segment in segments):
            raise UnsupportedError("liquid draws from words alone: leave the picture out, or ask for text about it")
        if any(segment.label is not None for segment in segments):
            raise ValueError("liquid draws words, not classes: say what to draw in words")
        bos = self.tokenizer.bos_token_id
        prompt = text.PromptBuilder(self.tokenizer).add_ids([] if bos is None else [bos])  # Qwen's has none
        if uncond:
            return prompt.add_template_text(UNCOND)
        return prompt.add_user_text(" ".join((segment.text or "").strip() for segment in segments)).add_template_text(
            INSTRUCTION
        )

    def _chat_prompt(self, segments: Sequence[Segment]) -> text.PromptBuilder:
        """Turns as the tokenizer's chat template lays them out, answered where the assistant speaks last."""
        told, segments = split_system_messages(segments)
        segments = [Segment(text=told, role="system"), *segments] if told else segments
        messages: list[dict[str, Any]] = []
        for number, segment in enumerate(segments):
            slot = f"\ue000{number}\ue001"
            if messages and messages[-1]["role"] == segment.role:
                messages[-1]["content"] += "\n" + slot
            else:
                messages.append({"role": segment.role, "content": slot})

        def render(messages: Any) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

        messages = text.merge_system_message(messages, render)
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )
        prompt = text.PromptBuilder(self.tokenizer)
        learnt = False
        for number, piece in enumerate(_SEGMENT_PLACEHOLDER.split(rendered)):
            if number % 2 == 0:
                ends = learnt and re.match(r"<[^>]+>", piece)
                prompt.add_template_text(piece[: ends.end()] if ends else "", loss=True).add_template_text(
                    piece[ends.end() if ends else 0 :]
                )
                continue
            segment = segments[int(piece)]
            learnt = segment.role == "assistant"
            if segment.image is not None:
                prompt.add_template_text(BOI).add_image(segment.image, self.image_length).add_template_text(EOI)
            elif segment.label is not None:
                raise ValueError("liquid draws words, not classes: say it in words")
            else:
                prompt.add_user_text((segment.text or "").strip(), loss=learnt)
        return prompt


def matches(folder: Path, config: dict[str, Any]) -> bool:
    """Is this a causal language model whose tokenizer has Liquid's three tokens?"""
    if not str(next(iter(config.get("architectures") or []), "")).endswith("ForCausalLM"):
        return False
    path = folder / "tokenizer.json"
    return path.is_file() and all(f'"{name}"' in path.read_text(encoding="utf-8") for name in (BOI, EOI, UNCOND))


def check_supported(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a language model that is not computed here as it should be."""
    from transformers import AutoConfig

    text_config = AutoConfig.for_model(**config).get_text_config()
    windowed = "sliding_attention" in (getattr(text_config, "layer_types", None) or ())
    capped = getattr(text_config, "final_logit_softcapping", None)
    if windowed or capped or getattr(text_config, "logit_scale", None) not in (None, 1.0):
        reason = "attends in windows" if windowed else "caps or scales its logits"
        kind = text_config.model_type
        raise ValueError(
            f"{folder} is Liquid on {kind}, which {reason} and is not supported: Gemma, Llama and Qwen are"
        )


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """The model in `folder`, in the public layout or in ours, strictly. dtype: None is as it is stored."""
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
    writers: dict[str, Generator] = {
        "text": Text(sorted(set(tokenizer.all_special_ids) | {*template.begin_ids.values(), template.image_end_id})),
        "next-token": NextToken(image_tokenizer.grid),
    }
    model = UnifiedModel("liquid", Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, writers)
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    return model


def causal_lm(model: UnifiedModel) -> Any:
    """It is one: codes are further rows of its table."""
    return model.backbone.lm


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, the image tokenizer's beside them."""
    with silence_transformers():
        model.backbone.lm.save_pretrained(folder)
    text.save(model.text_tokenizer, folder)
    assert isinstance(model.image_tokenizer, vqgan.VQGAN)
    vqgan.save_public(model.image_tokenizer, folder / "tokenizer")
