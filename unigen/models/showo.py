"""Show-o: one Phi that writes text a token at a time and pictures by masked prediction (Xie et al. 2024,
arXiv 2408.12528).

    <|t2i|><bos>{words}<eos> <|soi|> codes <|eoi|>                                        a picture
    <|t2i|><bos><eos> <|soi|> codes <|eoi|>                                               the unconditional branch
    <|mmu|><|soi|> codes <|eoi|><bos>USER: \\n{question} ASSISTANT:                        an answer

    engine = unigen.load("showlab/show-o-512x512")     # 1,024 codes; 256 of show-o
    engine.generate("a red apple", steps=18)

Attention is causal in text. Positions from <|soi|> to <|eoi|> attend to each other and to all before them; in a
question this holds for all positions up to <|eoi|> (section 3.2). The padding of the official prompts is masked
everywhere, and so left out. The language model's settings and text tokenizer are those of Phi-1.5, the image tokenizer
is showlab/magvitv2: both are looked for in the model's folder (phi-1_5/, magvitv2/), else fetched from the hub.
Checkpoints that read pictures by CLIP are not supported. Public weights: not run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.batch import Layout, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.base import GenerationState, Generator, StepInput
from unigen.generators.masked import Masked, MaskedState
from unigen.generators.next_token import Text
from unigen.hub.resolve import CONFIG, MANIFEST, fetch_metadata, fetch_snapshot, find_component, read_json
from unigen.hub.weights import load_pretrained, load_strict, read_weights, write_tensors
from unigen.model.template import Output, PretrainedTemplate, UnsupportedError
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.tokenizers import load_image_tokenizer, magvit2, text
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from transformers import PhiForCausalLM, PreTrainedTokenizerBase

LANGUAGE_MODEL_REPO, IMAGE_TOKENIZER_REPO = "microsoft/phi-1_5", "showlab/magvitv2"
"""Repositories of the hub with the parts that Show-o's repositories lack."""
PAD, SOI, EOI, T2I, MMU = "[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>"
ADDED_TOKENS = (PAD, SOI, EOI, "<|sov|>", "<|eov|>", T2I, MMU, "<|t2v|>", "<|v2v|>", "<|lvg|>")
"""Special tokens, whose ids follow Phi's in this order."""
MAX_PROMPT_LEN = 129
"""The most ids of a prompt for a picture; longer ones are truncated, as in training."""
STEPS, CHOICE_TEMPERATURE = 50, 1.0
DEFAULT_SAMPLING = {"guidance": 6.0, "temperature": 1.0}
VLLM_UNSUPPORTED = "it generates images by masked prediction, not one code after another"
WEIGHT_PREFIX = "showo."


class ShowoMasked(Masked):
    """Masked prediction by Show-o's own sampler.

    <|soi|> before the codes and <|eoi|> after them attend to the codes and are attended to. Of all codes, fixed ones
    included, step s (from 1) of S leaves this many masked, and adds Gumbel noise of this temperature to confidences:

        n_s = floor(P cos(pi s / 2S))        tau_s = tau_0 prod_{i <= s} (1 - i / S)
    """

    def __init__(self, grid: tuple[int, int], mask: int, end_id: int) -> None:
        """
        Args:
            grid: rows and columns of codes.
            mask: the id of a masked code.
            end_id: the id after the codes.
        """
        super().__init__(grid, mask, STEPS, CHOICE_TEMPERATURE)
        self.end_id = end_id

    def attend_until(self) -> list[int] | None:
        """The last position of the codes, for all of them and the two ids around them."""
        return [self.num_positions()] * (self.num_positions() + 2)

    def prepare_step(self, state: GenerationState) -> StepInput:
        """The codes, masked or not, and the id after them; all attend to each other."""
        ids = [*super().prepare_step(state).ids, self.end_id]
        return StepInput(ids, attend_until=[len(ids) - 1] * len(ids))

    def num_masked(self, state: MaskedState, number: int, steps: int) -> int:
        """The number of codes that stay masked after a step: at least one, and 0 after the last step."""
        if state.step_index + 1 >= steps:
            return 0
        ratio = torch.cos(torch.tensor((state.step_index + 1) / steps) * math.pi * 0.5)  # fp32: the rounding matters
        return max(1, min(int((state.ids_P < 0).sum()) - 1, int(self.num_positions() * ratio)))

    def choice_temperature_at(self, step: int, steps: int) -> float:
        """The temperature of the noise on confidences in a step, counted from 0."""
        return self.choice_temperature * math.prod(1 - (s + 1) / steps for s in range(step + 1))

    def sample_gumbel(self, count: int, rng: torch.Generator) -> Tensor:
        """Standard Gumbel noise (count,), with the official clamps."""
        uniform = torch.empty(count).uniform_(generator=rng).clamp(min=1e-20)
        return -(-uniform.log()).clamp(min=1e-20).log()


class ShowoTemplate(PretrainedTemplate):
    """Lays out the words of a picture, or one question about one picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_codes: int) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            num_codes: codes of a picture.

        Raises:
            ValueError: the tokenizer lacks special tokens.
        """
        super().__init__(tokenizer)
        self.num_codes = num_codes
        vocab = tokenizer.get_vocab()
        if missing := [name for name in ADDED_TOKENS if name not in vocab]:
            raise ValueError(f"the text tokenizer has no {', '.join(missing)}: it is not Show-o's")
        self.special_ids: dict[str, int] = {name: vocab[name] for name in ADDED_TOKENS}
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.begin_ids = {"masked": self.special_ids[SOI]}

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: codes in raster order, then EOI."""
        return Layout(grid, suffix=(self.special_ids[EOI],))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize a picture by its shorter side, then crop its centre.

        Args:
            image: of any mode.
            size: pixels along a side.

        Returns:
            Pixels (size, size, channels), uint8.
        """
        width, height = (size * side // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        """The codes that a mask marks, as the official script resizes it: bicubic, without antialiasing.

        Args:
            mask: white where it marks.
            size: pixels along a side of the picture.
            grid: rows and columns of codes.

        Returns:
            Bool (h, w), True where the resized mask is at least one half.
        """
        marks_HW = torch.from_numpy(np.array(self.preprocess(mask.convert("L"), size))).float() / 255
        cells_hw = torch.nn.functional.interpolate(marks_HW[None, None], size=grid, mode="bicubic")[0, 0]
        return (cells_hw >= 0.5).numpy()

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        """The number of ids of a prompt up to EOI, which attend to each other; 0 without a picture."""
        return ids.index(self.special_ids[EOI]) + 1 if self.special_ids[EOI] in ids else 0

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on; see `Template.prompt`.

        Raises:
            UnsupportedError: the request is an image from more than text, or an answer to other than one question
                about one image.
        """
        if output == "image":
            return self._image_prompt(document.segments, bool(branch))
        return self._question_prompt(document.segments)

    def encode(self, document: Document, *, uncond: bool = False, generator: str = "masked") -> Tokens:
        """Lay out a whole document for training.

        Args:
            document: ends in a picture of the assistant's; the loss is on that picture.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the image.

        Raises:
            ValueError: the document does not end in such a picture.
        """
        last = document.segments[-1]
        if last.image is None or last.role != "assistant":
            raise ValueError("showo learns to draw here: give documents that end in a picture of the assistant's")
        tokens = self._image_prompt(document.segments[:-1], uncond)
        tokens.add([self.special_ids[SOI]])
        tokens.add_image(last.image, self.num_codes, loss=True, handler=generator)
        tokens.add([self.special_ids[EOI]])
        return tokens

    def _image_prompt(self, segments: Sequence[Segment], uncond: bool) -> Tokens:
        """The words of a picture, truncated to `MAX_PROMPT_LEN` ids; none where `uncond`."""
        if any(segment.text is None for segment in segments):
            raise UnsupportedError(
                "showo generates images from text alone: leave pictures and classes out, or ask for text"
            )
        words = "" if uncond else " ".join((segment.text or "").strip() for segment in segments)
        prompt = text.PromptBuilder(self.tokenizer, self.special_ids).add_ids(
            [self.special_ids[T2I], self.tokenizer.bos_token_id]
        )
        tokens = Tokens()
        tokens.add([*prompt.add_user_text(words).build().ids[: MAX_PROMPT_LEN - 1], self.tokenizer.eos_token_id])
        return tokens

    def _question_prompt(self, segments: Sequence[Segment]) -> Tokens:
        """A picture, and the question about it."""
        images = [segment.image for segment in segments if segment.image is not None]
        if len(images) != 1 or any(segment.label is not None or segment.role != "user" for segment in segments):
            raise UnsupportedError("showo answers one question about one picture: give a picture and words")
        prompt = text.PromptBuilder(self.tokenizer, self.special_ids).add_ids(
            [self.special_ids[MMU], self.special_ids[SOI]]
        )
        prompt.add_image(images[0], self.num_codes).add_ids([self.special_ids[EOI], self.tokenizer.bos_token_id])
        words = " ".join((segment.text or "").strip() for segment in segments if segment.image is None)
        return prompt.add_template_text("USER: \n").add_user_text(words).add_template_text(" ASSISTANT:").build()


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether config.json, {} where there is none, is that of this family."""
    return config.get("_class_name") == "Showo"


def check_supported(folder: Path, config: Mapping[str, object]) -> None:
    """Raise ValueError for Show-o with CLIP; the message names the models that are supported."""
    if config.get("w_clip_vit"):
        raise ValueError(
            f"{folder} is a Show-o that reads pictures by CLIP, which is not supported: "
            "showlab/show-o and showlab/show-o-512x512 are"
        )


def load(folder: Path, dtype: torch.dtype | None) -> UnifiedModel:
    """Load the model in a folder, in the public layout or in ours. No tensor may be missing or left over.

    Args:
        folder: of the model.
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: the folder holds no whole model of this family.
    """
    from transformers import PhiForCausalLM

    if (folder / MANIFEST).is_file():
        tokenizer = text.load_from_model(folder)
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
        lm = load_pretrained(PhiForCausalLM, folder, dtype)
    else:
        config = read_json(folder / CONFIG)
        phi_folder = find_part(folder, LANGUAGE_MODEL_REPO, fetch_metadata)
        tokenizer = text.load_from_model(phi_folder)
        tokenizer.add_special_tokens({"pad_token": PAD, "additional_special_tokens": list(ADDED_TOKENS[1:])})
        tokenizer_state = read_weights(find_part(folder, IMAGE_TOKENIZER_REPO, fetch_snapshot))
        image_tokenizer = magvit2.from_public(tokenizer_state, math.isqrt(config["num_vq_tokens"]))
        lm = build_phi(read_weights(folder), read_json(phi_folder / CONFIG), folder, dtype)
    vocabulary = Vocabulary(len(tokenizer), image_tokenizer.codebook_size)
    if lm.config.vocab_size != vocabulary.image_stop + 1:
        sizes = f"{len(tokenizer)} pieces of text, {image_tokenizer.codebook_size} image codes and the mask"
        raise ValueError(f"{folder}: a table of {lm.config.vocab_size} rows is not that of {sizes}")
    lm.config.bos_token_id, lm.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    grid = image_tokenizer.grid
    template = ShowoTemplate(tokenizer, grid[0] * grid[1])
    generators: dict[str, Generator] = {
        "text": Text(sorted({*tokenizer.all_special_ids, *template.special_ids.values()})),
        "masked": ShowoMasked(grid, vocabulary.image_stop, template.special_ids[EOI]),
    }
    model = UnifiedModel("showo", Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, generators)
    model.set_default_sampling("masked", **DEFAULT_SAMPLING)
    return model


def find_part(folder: Path, repo: str, fetch: Callable[[str], Path]) -> Path:
    """The folder of a part that another repository holds.

    Args:
        folder: the model folder, which may contain the part.
        repo: the repository of the hub.
        fetch: fetches a repository, and returns its folder.
    """
    return find_component(folder, f"{repo.partition('/')[2]}/", "a part of Show-o", lambda: fetch(repo))


def build_phi(
    state: Mapping[str, Tensor], settings: dict[str, Any], folder: Path, dtype: torch.dtype | None
) -> PhiForCausalLM:
    """Build the language model: Phi with normalized queries and keys, and further rows of its table.

    Args:
        state: the tensors of a public folder.
        settings: the config of the Phi that it was tuned from.
        folder: for errors.
        dtype: of the weights; None: as they are stored.

    Returns:
        A `PhiForCausalLM`.

    Raises:
        ValueError: tensors or settings are missing.
    """
    from transformers import PhiConfig, PhiForCausalLM
    from transformers.initialization import no_init_weights

    stored_state = {
        name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")
    }  # computed from the config
    model_state = {name.removeprefix(WEIGHT_PREFIX): tensor for name, tensor in stored_state.items()}
    table = model_state.get("model.embed_tokens.weight")
    if table is None or "hidden_size" not in settings:  # defaults of the class give a model of billions of parameters
        raise ValueError(f"checkpoint {folder} is not Show-o's: its table or the settings of its Phi are missing")
    config = PhiConfig(**settings | {"vocab_size": len(table), "qk_layernorm": True})
    with no_init_weights():
        lm = PhiForCausalLM._from_config(config, attn_implementation="sdpa")
    load_strict(lm.to(dtype or table.dtype), model_state, folder)
    return lm


def save_public(model: UnifiedModel, folder: Path) -> None:
    """Write the files of the public layout, those of the other repositories beside them.

    Args:
        model: of this family.
        folder: exists and is empty.
    """
    lm, tokenizer, vocabulary = model.backbone.lm, model.image_tokenizer, model.vocabulary
    assert isinstance(tokenizer, magvit2.MAGVIT2)
    weights = "pytorch_model.safetensors"
    write_tensors(folder / weights, {WEIGHT_PREFIX + name: tensor for name, tensor in lm.state_dict().items()})
    config = {"codebook_size": vocabulary.image_size, "llm_model_path": LANGUAGE_MODEL_REPO, "load_from_showo": True}
    config |= {"llm_vocab_size": vocabulary.text_size - len(ADDED_TOKENS), "num_vq_tokens": math.prod(tokenizer.grid)}
    config |= {"mask_token_id": vocabulary.image_stop, "vocab_size": vocabulary.image_stop + 1, "w_clip_vit": False}
    save_json(folder / CONFIG, {"_class_name": "Showo"} | config)
    phi_folder, tokenizer_folder = (
        folder / repo.partition("/")[2] for repo in (LANGUAGE_MODEL_REPO, IMAGE_TOKENIZER_REPO)
    )
    tokenizer_folder.mkdir()
    write_tensors(tokenizer_folder / weights, magvit2.to_public(tokenizer))
    save_json(tokenizer_folder / CONFIG, {"_class_name": "MAGVITv2"})
    lm.config.save_pretrained(phi_folder)
    text.save(model.text_tokenizer, phi_folder)
