"""Lumina-mGPT: Chameleon tuned to pictures of any size, which open with their size and have ends of rows (Liu et al.
2024, arXiv 2408.02657).

    <s>Generate an image of {W}x{H} according to the following prompt:\\n{words}<reserved08706>
        <racm3:break> h-token w-token (2w codes <reserved08799>) x 2h <eoss>                        a picture
    <racm3:break> h-token w-token ...                                       guidance's other branch: the picture alone
    <s>{question} <racm3:break> ... <eoss><reserved08706>                   an answer, or what an edit begins with

    engine = unigen.load("Alpha-VLLM/Lumina-mGPT-7B-768")          # -Omni edits
    engine.generate("a waterfall", size=(1024, 512))

h and w count squares of 32 pixels, two codes a side: <reserved08800 + n>. The layers are Chameleon's; public folders
lack the encoder of pictures, and their norms of queries and keys have r rows, which heads share:

    norm of head i = row floor(i r / heads)

Pictures are read and drawn by Chameleon's VQGAN, looked for as in Liquid. The official code draws text by its 10
likeliest pieces, here as in all families. Public weights: not run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.batch import Layout, Tokens
from unigen.config import save_json
from unigen.document import Document, Segment
from unigen.hub.resolve import CONFIG, MANIFEST, read_json
from unigen.hub.weights import load_pretrained, read_weights
from unigen.model.template import Output
from unigen.model.unified import UnifiedModel
from unigen.models import chameleon
from unigen.models.chameleon import BOI, EOI, EOT, MASK_LOGITS_KEY, ChameleonTemplate
from unigen.tokenizers import text, vqgan

EOL = "<reserved08799>"
CELL = 2
"""Codes along a side of the squares that sizes are counted in."""
MAX_CELLS = 64
"""Squares along a side."""
MAX_ASPECT_RATIO = 4
"""The longest pictures that are read: so many times as long as wide."""
PROMPT_TEMPLATE = "Generate an image of {}x{} according to the following prompt:\n"
SIZE_IN_NAME = re.compile(r"mGPT-\d+B-(\d+)")
"""What a folder says of the size that it was tuned to: its name, or the last of those above it that says one."""
LUMINA2_VOCAB_SIZE = 171_385
"""Ids of Lumina-mGPT 2.0."""
PUBLIC_CLASS = "ChameleonXLLMXForConditionalGeneration"
DEFAULT_SAMPLING: dict[str, Any] = {"guidance": 4.0, "temperature": 1.0, "top_k": 2000}


class LuminaTemplate(ChameleonTemplate):
    """stride: pixels a code along each side; size: along each side of a picture, where nothing says so."""

    special_tokens = (BOI, EOI, EOT, EOL)
    variable_size, num_guidance_scales, space_around_images = True, 1, True
    open_turn_outputs = ()

    def __init__(self, tokenizer: Any, stride: int, size: int) -> None:
        super().__init__(tokenizer, (size // stride) ** 2)
        self.stride, self.size = stride, size
        known = tokenizer.get_vocab()
        self.size_token_ids = [
            known[name] for n in range(1, MAX_CELLS + 1) if (name := f"<reserved{8800 + n:05d}>") in known
        ]

    def layout(self, grid: tuple[int, int]) -> Layout:
        if any(codes % CELL or codes // CELL > len(self.size_token_ids) for codes in grid):
            side, (height, width) = CELL * self.stride, (codes * self.stride for codes in grid)
            max_cells = f"up to {len(self.size_token_ids) * side}"
            raise ValueError(
                f"a size is width and height in pixels, multiples of {side} {max_cells}, not {width}x{height}"
            )
        opening = tuple(self.size_token_ids[codes // CELL - 1] for codes in grid)
        return Layout(grid, opening, (self.special_ids[EOL],), (self.special_ids[EOI],))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """The middle of the picture, in that shape of at most `size` squared pixels which leaves most of it."""
        width, height = max(
            crop_sizes(size, CELL * self.stride), key=lambda shape: (kept_fraction(image.size, shape), shape)
        )
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width / image.width, height / image.height)
        image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        segments = document.segments
        if branch:
            return Tokens()
        if output == "image" and is_user_text(segments):
            return self._image_prompt(segments, document.size or (self.size, self.size)).build()
        return super().prompt(document, output=output)

    def encode(self, document: Document, *, uncond: bool = False, generator: str = "next-token") -> Tokens:
        """A whole document to learn from: one that ends in a picture of the assistant's, with the words that it is
        drawn from; else a chat, of which the assistant's answers are learnt."""
        *asked, last = document.segments
        if uncond:
            prompt = self._build_prompt([last], add_turn_ends=False, add_bos=False)
        elif isinstance(last.image, Tensor) and last.role == "assistant" and is_user_text(asked):
            height, width = last.image.shape
            prompt = self._image_prompt(asked, (width * self.stride, height * self.stride))
            prompt = self._add_image(prompt, last.image, loss=True)
        else:
            prompt = self._build_prompt(document.segments, add_turn_ends=True)
        return (prompt.add_template_text(EOT, loss=True) if last.role == "assistant" else prompt).build()

    def _image_prompt(self, segments: Sequence[Segment], size: tuple[int, int]) -> text.PromptBuilder:
        words = " ".join((segment.text or "").strip() for segment in segments)
        prompt = text.PromptBuilder(self.tokenizer, self.special_ids).add_ids([self.tokenizer.bos_token_id])
        return prompt.add_template_text(PROMPT_TEMPLATE.format(*size)).add_user_text(words).add_template_text(EOT)

    def _build_prompt(
        self, segments: Sequence[Segment], add_turn_ends: bool, add_bos: bool = True
    ) -> text.PromptBuilder:
        """Words before pictures where a user's turn begins with all of its pictures: so the model was tuned."""
        ordered: list[Segment] = []
        for role, turn in groupby(segments, key=lambda segment: segment.role):
            said = list(turn)
            first_text = next((n for n, segment in enumerate(said) if segment.image is None), len(said))
            images_lead_turn = role == "user" and all(segment.image is None for segment in said[first_text:])
            ordered += said[first_text:] + said[:first_text] if images_lead_turn else said
        return super()._build_prompt(ordered, add_turn_ends, add_bos)

    def _add_image(self, prompt: text.PromptBuilder, image: Any, loss: bool) -> text.PromptBuilder:
        if not isinstance(image, Tensor):
            raise ValueError(
                "pictures stand in this model's prompts by their own size: give them as codes (model.encode_document)"
            )
        layout = self.layout((image.shape[0], image.shape[1]))
        prompt.add_template_text(BOI, loss=loss).add_ids(list(layout.prefix)).add_image(
            image, layout.num_ids, loss=loss
        )
        return prompt.add_ids(list(layout.suffix))


def is_user_text(segments: Sequence[Segment]) -> bool:
    """Is it a user's words alone?"""
    return all(segment.text is not None and segment.role == "user" for segment in segments)


def crop_sizes(size: int, side: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels of pictures to be read: multiples of `side`, of no more pixels than `size` squared,
    for each width the greatest heights, at most `MAX_ASPECT_RATIO` times as long as wide."""
    max_cells = (size // side) ** 2
    cell_sizes = {(w, h) for w in range(1, max_cells + 1) for h in range(max_cells // (w + 1), max_cells // w + 1) if h}
    return [(w * side, h * side) for w, h in cell_sizes if max(w, h) <= MAX_ASPECT_RATIO * min(w, h)]


def kept_fraction(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The share of a picture that is left when it is cut to a shape."""
    width_scale, height_scale = (
        target_side / source_side for target_side, source_side in zip(shape, size, strict=True)
    )
    return min(width_scale, height_scale) / max(width_scale, height_scale)


def matches(folder: Path, config: dict[str, Any]) -> bool:
    """Is this Chameleon by Lumina's own class? transformers' configs do not say whether codes are forbidden."""
    return config.get("model_type") == "chameleon" and MASK_LOGITS_KEY in config


def check_supported(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a relative that is not here."""
    if (
        config.get("vocab_size") == LUMINA2_VOCAB_SIZE
        or "mGPT-2" in f"{folder.absolute()} {config.get('_name_or_path', '')}"
    ):
        raise ValueError(
            f"{folder} is Lumina-mGPT 2.0, whose image tokenizer is another and which is not supported: "
            "Alpha-VLLM/Lumina-mGPT-7B-768 and -Omni are"
        )


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """The model in `folder`, in the public layout or in ours, strictly. dtype: None is as it is stored."""
    from transformers import ChameleonForConditionalGeneration

    tokenizer, image_tokenizer = chameleon.load_tokenizers(folder)
    if (folder / MANIFEST).is_file():
        lm = load_pretrained(ChameleonForConditionalGeneration, folder, dtype)
    else:
        if sizes := SIZE_IN_NAME.findall(str(folder.absolute())):
            image_tokenizer.settings = replace(image_tokenizer.settings, image_size=int(sizes[-1]))
        state = from_public(read_weights(folder), read_json(folder / CONFIG))
        # transformers' class has an encoder of pictures, which is that of the image tokenizer
        for name, tensor in vqgan.to_public(image_tokenizer).items():
            if not name.startswith("decoder."):
                state.setdefault(f"{VISION_PREFIX}{name}", tensor)
        lm = load_pretrained(ChameleonForConditionalGeneration, folder, dtype, state)
    size = image_tokenizer.image_size
    template = LuminaTemplate(tokenizer, size // image_tokenizer.grid[0], size)
    specials = (*template.special_ids.values(), *template.size_token_ids)
    model = chameleon.build_chameleon("lumina", lm, image_tokenizer, template, specials, row_end=1)
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    return model


VISION_PREFIX = "model.vqmodel."
_QK_NORM = re.compile(r"\.self_attn\.([qk])_norm\.(weight|bias)$")


def from_public(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a public folder as transformers has them: a norm for each head."""
    queries = config["num_attention_heads"]
    heads = {"q": queries, "k": config.get("num_key_value_heads") or queries}
    return {
        name: tensor.repeat_interleave(heads[norm[1]] // len(tensor), 0) if (norm := _QK_NORM.search(name)) else tensor
        for name, tensor in state.items()
    }


def to_public(state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The same tensors in the public layout. ValueError where heads that share a norm no longer have the same."""
    theirs = {}
    for name, tensor in state.items():
        if _QK_NORM.search(name):
            tensor, repeated = tensor.unflatten(0, (rows, -1))[:, 0], tensor
            if not torch.equal(tensor.repeat_interleave(len(repeated) // rows, 0), repeated):
                raise ValueError(f"{name}: its heads have norms of their own, which the public layout cannot hold")
        if not name.startswith(VISION_PREFIX):
            theirs[name] = tensor
    return theirs


causal_lm = chameleon.causal_lm


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, and Chameleon's image tokenizer beside them."""
    lm = model.backbone.lm
    chameleon.save_public(model, folder, to_public(lm.state_dict(), lm.config.model_parallel_size))
    config = read_json(folder / CONFIG)
    save_json(folder / CONFIG, config | {"architectures": [PUBLIC_CLASS], MASK_LOGITS_KEY: False})
