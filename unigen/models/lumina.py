"""Lumina-mGPT: Chameleon tuned to pictures of any size, which begin with their size and mark the end of each row
(Liu et al. 2024, arXiv 2408.02657).

    <s>Generate an image of {W}x{H} according to the following prompt:\\n{words}<reserved08706>
        <racm3:break> h-token w-token (2w codes <reserved08799>) x 2h <eoss>                        a picture
    <racm3:break> h-token w-token ...                                       the unconditional branch: the picture alone
    <s>{question} <racm3:break> ... <eoss><reserved08706>                   an answer, or the prompt of an edit

    engine = unigen.load("Alpha-VLLM/Lumina-mGPT-7B-768")          # -Omni edits
    engine.generate("a waterfall", size=(1024, 512))

h and w count squares of 32 pixels, two codes along a side: <reserved08800 + n>. The layers are Chameleon's. Public
folders lack the encoder of pictures, and their norms of queries and keys have r rows, each shared by several heads:

    norm of head i = row floor(i r / heads)

Images are encoded and decoded by Chameleon's VQGAN, looked for as in Liquid. The official code draws text by its 10
likeliest pieces, here as in all families. Public weights: not run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.batch import Layout, Tokens
from unigen.document import Document, Segment
from unigen.hub.resolve import CONFIG, MANIFEST, read_json
from unigen.hub.weights import load_pretrained, read_weights
from unigen.model.template import Output
from unigen.model.unified import UnifiedModel
from unigen.models import chameleon
from unigen.models.chameleon import BOI, EOI, EOT, MASK_LOGITS_KEY, ChameleonTemplate
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import text, vqgan
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unigen.document import SegmentImage

EOL = "<reserved08799>"
CELL = 2
"""Codes along a side of the squares in which sizes are counted."""
MAX_CELLS = 64
"""Squares along a side."""
MAX_ASPECT_RATIO = 4
"""The largest aspect ratio of an input picture: the longer side over the shorter."""
PROMPT_TEMPLATE = "Generate an image of {}x{} according to the following prompt:\n"
SIZE_IN_NAME = re.compile(r"mGPT-\d+B-(\d+)")
"""The size that a model was tuned to, in the name of its folder or of the nearest folder above that has one."""
LUMINA2_VOCAB_SIZE = 171_385
"""Vocabulary size of Lumina-mGPT 2.0."""
PUBLIC_CLASS = "ChameleonXLLMXForConditionalGeneration"
DEFAULT_SAMPLING: dict[str, object] = {"guidance": 4.0, "temperature": 1.0, "top_k": 2000}


class LuminaTemplate(ChameleonTemplate):
    """Chameleon's template for pictures of any size, with one scale of guidance."""

    special_tokens = (BOI, EOI, EOT, EOL)
    variable_size, num_guidance_scales, space_around_images = True, 1, True
    open_turn_outputs = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stride: int, size: int) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            stride: pixels per code along a side.
            size: pixels along a side of a picture whose size is not given.
        """
        super().__init__(tokenizer, (size // stride) ** 2)
        self.stride, self.size = stride, size
        vocab = tokenizer.get_vocab()
        self.size_token_ids = [
            vocab[name] for n in range(1, MAX_CELLS + 1) if (name := f"<reserved{8800 + n:05d}>") in vocab
        ]

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: height and width, rows of codes that end in EOL, then EOI.

        Raises:
            ValueError: there are no ids for this size.
        """
        if any(codes % CELL or codes // CELL > len(self.size_token_ids) for codes in grid):
            side, (height, width) = CELL * self.stride, (codes * self.stride for codes in grid)
            max_cells = f"up to {len(self.size_token_ids) * side}"
            raise ValueError(
                f"a size is width and height in pixels, multiples of {side} {max_cells}, not {width}x{height}"
            )
        prefix = tuple(self.size_token_ids[codes // CELL - 1] for codes in grid)
        return Layout(grid, prefix, (self.special_ids[EOL],), (self.special_ids[EOI],))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize a picture and crop its centre, in that shape of at most `size` squared pixels which keeps most of it.

        Args:
            image: RGB.
            size: the root of the most pixels.

        Returns:
            Pixels (H, W, 3), uint8, H and W multiples of `CELL` codes.
        """
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
        """Lay out a document up to where the model goes on; see `Template.prompt`. Guidance's other branch is empty."""
        segments = document.segments
        if branch:
            return Tokens()
        if output == "image" and is_user_text(segments):
            return self._image_prompt(segments, document.size or (self.size, self.size)).build()
        return super().prompt(document, output=output)

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole document for training.

        Args:
            document: where it ends in a picture of the assistant's, the loss is on that picture; else the document is
                a chat, and the loss is on the assistant's answers.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the image.
        """
        *prompt_segments, last = document.segments
        if uncond:
            prompt = self._build_prompt([last], add_turn_ends=False, add_bos=False)
        elif isinstance(last.image, Tensor) and last.role == "assistant" and is_user_text(prompt_segments):
            height, width = last.image.shape
            prompt = self._image_prompt(prompt_segments, (width * self.stride, height * self.stride))
            prompt = self._add_image(prompt, last.image, loss=True)
        else:
            prompt = self._build_prompt(document.segments, add_turn_ends=True)
        return (prompt.add_template_text(EOT, loss=True) if last.role == "assistant" else prompt).build()

    def _image_prompt(self, segments: Sequence[Segment], size: tuple[int, int]) -> text.PromptBuilder:
        """The words of a picture of `size`, (width, height) in pixels."""
        words = " ".join((segment.text or "").strip() for segment in segments)
        prompt = text.PromptBuilder(self.tokenizer, self.special_ids).add_ids([self.tokenizer.bos_token_id])
        return prompt.add_template_text(PROMPT_TEMPLATE.format(*size)).add_user_text(words).add_template_text(EOT)

    def _build_prompt(
        self, segments: Sequence[Segment], add_turn_ends: bool, add_bos: bool = True
    ) -> text.PromptBuilder:
        """Segments with words before pictures in user turns that begin with all their pictures, as it was tuned."""
        ordered: list[Segment] = []
        for role, turn in groupby(segments, key=lambda segment: segment.role):
            turn_segments = list(turn)
            first_text = next(
                (n for n, segment in enumerate(turn_segments) if segment.image is None), len(turn_segments)
            )
            images_lead_turn = role == "user" and all(segment.image is None for segment in turn_segments[first_text:])
            ordered += turn_segments[first_text:] + turn_segments[:first_text] if images_lead_turn else turn_segments
        return super()._build_prompt(ordered, add_turn_ends, add_bos)

    def _add_image(self, prompt: text.PromptBuilder, image: SegmentImage, loss: bool) -> text.PromptBuilder:
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
    """Whether all segments are words of a user."""
    return all(segment.text is not None and segment.role == "user" for segment in segments)


def crop_sizes(size: int, side: int) -> list[tuple[int, int]]:
    """Sizes to which input pictures are cropped: for each width the greatest heights.

    Args:
        size: the root of the most pixels.
        side: widths and heights are multiples of it, in pixels.

    Returns:
        Widths and heights in pixels, at most `MAX_ASPECT_RATIO` times as long as wide.
    """
    max_cells = (size // side) ** 2
    cell_sizes = {(w, h) for w in range(1, max_cells + 1) for h in range(max_cells // (w + 1), max_cells // w + 1) if h}
    return [(w * side, h * side) for w, h in cell_sizes if max(w, h) <= MAX_ASPECT_RATIO * min(w, h)]


def kept_fraction(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The fraction of a picture that is kept when it is cropped to a shape.

    Args:
        size: width and height of the picture.
        shape: width and height of the crop; only its aspect ratio matters.

    Returns:
        In (0, 1].
    """
    width_scale, height_scale = (
        target_side / source_side for target_side, source_side in zip(shape, size, strict=True)
    )
    return min(width_scale, height_scale) / max(width_scale, height_scale)


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether the folder holds Chameleon in Lumina's own class, whose configs say whether codes are masked.

    Args:
        folder: the model folder, without our unigen.json.
        config: the contents of its config.json, {} where there is none.
    """
    return config.get("model_type") == "chameleon" and MASK_LOGITS_KEY in config


def check_supported(folder: Path, config: Mapping[str, object]) -> None:
    """Raise ValueError for Lumina-mGPT 2.0; the message names the models that are supported."""
    if (
        config.get("vocab_size") == LUMINA2_VOCAB_SIZE
        or "mGPT-2" in f"{folder.absolute()} {config.get('_name_or_path', '')}"
    ):
        raise ValueError(
            f"{folder} is Lumina-mGPT 2.0, whose image tokenizer is another and which is not supported: "
            "Alpha-VLLM/Lumina-mGPT-7B-768 and -Omni are"
        )


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
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
    """Expand the norms of a public folder to one for each head, as transformers has them.

    Args:
        state: the tensors of a public folder.
        config: the contents of its config.json.
    """
    queries = config["num_attention_heads"]
    heads = {"q": queries, "k": config.get("num_key_value_heads") or queries}
    return {
        name: tensor.repeat_interleave(heads[norm[1]] // len(tensor), 0) if (norm := _QK_NORM.search(name)) else tensor
        for name, tensor in state.items()
    }


def to_public(state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The tensors in the public layout.

    Args:
        state: the tensors as transformers has them.
        rows: norms of queries, and of keys, in the public layout.

    Raises:
        ValueError: heads that share a norm there have different ones.
    """
    public_state = {}
    for name, tensor in state.items():
        if _QK_NORM.search(name):
            tensor, head_norms = tensor.unflatten(0, (rows, -1))[:, 0], tensor
            if not torch.equal(tensor.repeat_interleave(len(head_norms) // rows, 0), head_norms):
                raise ValueError(f"{name}: its heads have norms of their own, which the public layout cannot hold")
        if not name.startswith(VISION_PREFIX):
            public_state[name] = tensor
    return public_state


causal_lm = chameleon.causal_lm


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, and Chameleon's image tokenizer beside them.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    lm = model.backbone.lm
    chameleon.save_public(model, folder, to_public(lm.state_dict(), lm.config.model_parallel_size))
    config = read_json(folder / CONFIG)
    save_json(folder / CONFIG, config | {"architectures": [PUBLIC_CLASS], MASK_LOGITS_KEY: False})
