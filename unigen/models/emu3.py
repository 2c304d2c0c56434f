"""Emu3: one Llama over text and image codes, which generates images of any size (Wang et al. 2024, arXiv 2409.18869).

    <bos>{words} masterpiece, film grained, best quality.<boi>{h}*{w}<img> (w codes <eol>) x h <eof><eoi>     a picture
    <bos>{negative prompt}<boi>{h}*{w}<img> ...                                           the unconditional branch
    <bos>You are a helpful assistant. USER: <boi>...<eoi>{question}. ASSISTANT:           an answer

    engine = unigen.load("Emu3-community/Emu3-Gen-hf")       # draws;  Emu3-Chat-hf answers
    engine.generate("a shiba inu", size=(960, 544))

The size stands in the prompt as text, rows first. Public weights: not run here.
"""

from __future__ import annotations

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
from unigen.hub.resolve import CONFIG, MANIFEST, image_processor_config, read_json, read_manifest
from unigen.hub.weights import load_pretrained, silence_transformers
from unigen.model.template import Output, PretrainedTemplate, UnsupportedError, images_first, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import load_image_tokenizer, text
from unigen.tokenizers.emu3_vq import Emu3VQ
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOI, IMG, EOI = "<|image start|>", "<|image token|>", "<|image end|>"
EOL, EOF = "<|extra_200|>", "<|extra_201|>"
QUALITY_SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
SYSTEM_PROMPT = "You are a helpful assistant. "
IMAGE_SIZE = 720
MIN_PIXELS, MAX_PIXELS = 512 * 512, 1024 * 1024
"""Limits of pixels of an input picture, where the folder's preprocessor_config.json has none."""
DEFAULT_SAMPLING = {"guidance": 3.0, "temperature": 1.0, "top_k": 2048}


class Emu3Template(PretrainedTemplate):
    """Lays out a prompt with the size of its picture, or a chat of words and pictures."""

    variable_size = True
    supports_system = True

    def __init__(self, tokenizer: Any, stride: int, pixel_limits: tuple[int, int] = (MIN_PIXELS, MAX_PIXELS)) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            stride: pixels per code along a side.
            pixel_limits: the fewest and the most pixels of an input picture.

        Raises:
            ValueError: the tokenizer lacks special tokens.
        """
        super().__init__(tokenizer)
        self.stride, self.pixel_limits = stride, pixel_limits
        self.special_tokens = (BOI, IMG, EOI, EOL, EOF)
        special_ids = {name: tokenizer.convert_tokens_to_ids(name) for name in self.special_tokens}
        if missing := [name for name, id in special_ids.items() if id in (None, tokenizer.unk_token_id)]:
            raise ValueError(f"the text tokenizer has no {', '.join(missing)}: it is not Emu3's")
        self.special_ids = special_ids
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.settings = {"min_pixels": pixel_limits[0], "max_pixels": pixel_limits[1]}
        self.begin_ids = {self.context_generator: special_ids[BOI]}

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids.

        The size as text, IMG, rows of codes that end in EOL, then EOF and EOI.
        """
        size_ids = self.tokenizer(f"{grid[0]}*{grid[1]}", add_special_tokens=False)["input_ids"]
        suffix = (self.special_ids[EOF], self.special_ids[EOI])
        return Layout(grid, (*size_ids, self.special_ids[IMG]), (self.special_ids[EOL],), suffix)

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize a picture in its aspect ratio, as near to its size as the limits and the stride allow.

        Args:
            image: RGB.
            size: not used.

        Returns:
            Pixels (H, W, 3), uint8, H and W multiples of the stride.
        """
        from transformers.models.emu3.image_processing_emu3 import smart_resize

        height, width = smart_resize(image.height, image.width, self.stride, *self.pixel_limits)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on; see `Template.prompt`.

        Raises:
            UnsupportedError: an image is requested, and the prompt holds more than words.
        """
        if output == "image":
            return self._image_prompt(document.segments, bool(branch)).build()
        prompt = self._chat_prompt(document.segments)
        return (prompt.add_template_text(" ASSISTANT:") if document.segments[-1].role == "user" else prompt).build()

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
            return self._chat_prompt(document.segments).add_ids([self.tokenizer.eos_token_id], loss=True).build()
        prompt = self._image_prompt(document.segments[:-1], uncond)
        return self._add_image(prompt, last, loss=True).add_ids([self.tokenizer.eos_token_id]).build()

    def _image_prompt(self, segments: Sequence[Segment], uncond: bool) -> text.PromptBuilder:
        """The words of a picture with the quality suffix, or the negative prompt."""
        if any(segment.text is None for segment in segments):
            raise UnsupportedError(
                "emu3 generates images from text alone: leave pictures and classes out, or ask for text"
            )
        prompt = text.PromptBuilder(self.tokenizer, self.special_tokens).add_ids([self.tokenizer.bos_token_id])
        words = " ".join((segment.text or "").strip() for segment in segments)
        return (
            prompt.add_template_text(NEGATIVE_PROMPT)
            if uncond
            else prompt.add_user_text(words).add_template_text(QUALITY_SUFFIX)
        )

    def _chat_prompt(self, segments: Sequence[Segment]) -> text.PromptBuilder:
        """Turns of a chat, with the loss on the assistant's words."""
        system_text, segments = split_system_messages(segments)
        prompt = text.PromptBuilder(self.tokenizer, self.special_tokens).add_ids([self.tokenizer.bos_token_id])
        prompt = prompt.add_user_text(f"{system_text} ") if system_text else prompt.add_template_text(SYSTEM_PROMPT)
        role, segments = None, images_first(segments)  # the authors' order in a question
        for number, segment in enumerate(segments):
            if segment.label is not None:
                raise ValueError("emu3 reads words, not classes: say it in words")
            if segment.role != role:
                prompt.add_template_text(
                    "USER: " if segment.role == "user" else " ASSISTANT: " if role else "ASSISTANT: "
                )
                role = segment.role
            if segment.image is not None:
                self._add_image(prompt, segment)
                continue
            follows_text = number and segments[number - 1].text and segments[number - 1].role == role
            prompt.add_user_text(" " * bool(follows_text) + (segment.text or "").strip(), loss=role == "assistant")
            if role == "user" and (number + 1 == len(segments) or segments[number + 1].role != "user"):
                prompt.add_template_text(".")
        return prompt

    def _add_image(self, prompt: text.PromptBuilder, segment: Segment, loss: bool = False) -> text.PromptBuilder:
        if not isinstance(segment.image, torch.Tensor):
            raise ValueError(
                "pictures stand in Emu3's prompts by their own size: give them as codes (model.encode_document)"
            )
        height, width = segment.image.shape
        layout = self.layout((height, width))
        prompt.add_ids([self.special_ids[BOI], *layout.prefix]).add_image(segment.image, layout.num_ids, loss=loss)
        return prompt.add_ids(list(layout.suffix), loss=loss)


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether config.json, {} where there is none, is that of this family."""
    return config.get("model_type") == "emu3"


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in transformers' layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration, LlamaForCausalLM

    read_json(folder / "tokenizer_config.json")
    tokenizer = text.load(folder)
    image_tokenizer: Emu3VQ
    if (folder / MANIFEST).is_file():
        is_llama = read_json(folder / CONFIG).get("model_type") == "llama"  # written by `causal_lm`
        lm = load_pretrained(LlamaForCausalLM if is_llama else Emu3ForCausalLM, folder, dtype)
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
        image_config = read_manifest(folder).get("template", {})
    else:
        full_model = load_pretrained(Emu3ForConditionalGeneration, folder, dtype)
        with torch.device("meta"):
            lm = Emu3ForCausalLM(full_model.config.text_config)
        lm.model, lm.lm_head, lm.generation_config = (
            full_model.model.text_model,
            full_model.lm_head,
            full_model.generation_config,
        )
        image_tokenizer = Emu3VQ(full_model.model.vqmodel.float(), IMAGE_SIZE)
        image_config = image_processor_config(folder)
        if any(value != 0.5 for name in ("image_mean", "image_std") for value in image_config.get(name, (0.5,))):
            raise ValueError(f"{folder}: pictures are read in [-1, 1], of mean and std 0.5")
    stride = image_tokenizer.image_size // image_tokenizer.grid[0]
    template = Emu3Template(
        tokenizer, stride, (image_config.get("min_pixels", MIN_PIXELS), image_config.get("max_pixels", MAX_PIXELS))
    )
    codes = image_tokenizer.codebook_size
    first_id = tokenizer.convert_tokens_to_ids(visual_token(0))
    if tokenizer.convert_tokens_to_ids(visual_token(codes - 1)) != first_id + codes - 1:
        raise ValueError(f"{folder}: the text tokenizer does not name the {codes} image codes in a row")
    if first_id + codes != lm.config.vocab_size:
        raise ValueError(f"{folder}: the image codes are not the last of the {lm.config.vocab_size} rows")
    forbidden = {*tokenizer.all_special_ids, *template.special_ids.values()}
    generators: dict[str, Generator] = {
        "text": Text(sorted(id for id in forbidden if id < first_id)),
        "next-token": NextToken(image_tokenizer.grid, row_end=1),
    }
    model = UnifiedModel(
        "emu3", Backbone(lm), Vocabulary(first_id, codes), tokenizer, image_tokenizer, template, generators
    )
    model.set_default_sampling("next-token", **DEFAULT_SAMPLING)
    return model


def visual_token(code: int) -> str:
    """The name of an image code's token in the text tokenizer."""
    return f"<|visual token {code:06d}|>"


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """Emu3's text model as the Llama that it is, under that class's names. It shares the tensors, and is for saving."""
    from transformers import LlamaConfig, LlamaForCausalLM

    lm = model.backbone.lm
    if isinstance(lm, LlamaForCausalLM):
        return lm
    settings = lm.config.to_dict()
    names = [
        name for name in LlamaConfig().to_dict() if name in settings and name not in ("architectures", "model_type")
    ]
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**{name: settings[name] for name in names}))
    llama.load_state_dict(lm.state_dict(), strict=True, assign=True)
    llama.generation_config = lm.generation_config
    return llama


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of transformers' layout.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    lm, image_tokenizer, template = model.backbone.lm, model.image_tokenizer, model.template
    assert isinstance(image_tokenizer, Emu3VQ) and isinstance(template, Emu3Template)
    config = Emu3Config(
        text_config=lm.config, vq_config=image_tokenizer.net.config, vocabulary_map=model.text_tokenizer.get_vocab()
    )
    with torch.device("meta"):
        full_model = Emu3ForConditionalGeneration(config)
    full_model.model.text_model, full_model.lm_head, full_model.model.vqmodel = (
        lm.model,
        lm.lm_head,
        image_tokenizer.net,
    )
    with silence_transformers():
        full_model.save_pretrained(folder)
    text.save(model.text_tokenizer, folder)
    settings = template.settings | {"spatial_factor": template.stride, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    save_json(folder / "preprocessor_config.json", {"image_processor_type": "Emu3ImageProcessor"} | settings)
