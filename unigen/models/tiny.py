"""The family of models trained by our own recipes: any decoder-only language model, its vocabulary grown by codes.

    <s><user> two apples on a blue background<assistant><boi> 64 codes <eoi></s>
    <s><user><boi> 64 codes <eoi> how many apples?<assistant> two</s>

A document is a chat. What the assistant says is learnt. The pictures of a message of the user's stand before its words,
in whatever order they were given: so they were learnt. In the blind rendering, the second branch of guidance, every
run of text is the one token <uncond> while the images stay: what the model saw where captions were dropped in training.
A model may draw classes instead of words: <s><user><class:7><assistant><boi> 64 codes <eoi></s>.
Text is lower case and each run opens with a space, so that a word has one spelling wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from unigen import generators, hub
from unigen.batch import Layout, Tokens, Vocabulary
from unigen.document import Document
from unigen.generators.base import BuildContext, Generator
from unigen.generators.next_token import Text
from unigen.media.pixels import center_crop_resize
from unigen.model.template import OUTPUTS, Output, images_first
from unigen.model.unified import GeneratorDict, UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.nn.cpu.llama import InferenceLlama
from unigen.tokenizers import ImageTokenizer, load_image_tokenizer
from unigen.tokenizers import text as text_tokenizers

USER, ASSISTANT, BOI, EOI = "<user>", "<assistant>", "<boi>", "<eoi>"
IMAGE, UNCOND, MASK = "<image>", "<uncond>", "<mask>"
BEGIN_TOKENS = {"next-token": BOI, "next-scale": "<boi:scale>", "masked": "<boi:masked>", "flow": "<boi:flow>"}
"""Each generator has a begin token of its own, so that one backbone knows which way of writing it is in. Others than
these take a spare one."""
CONTEXT_GENERATOR = "next-token"
"""The generator as which finished pictures stand in a chat: as codes in raster order."""
SPARE_TOKENS = tuple(f"<spare:{i}>" for i in range(8))
REQUIRED_TOKENS = (USER, ASSISTANT, EOI, IMAGE, UNCOND, MASK, *BEGIN_TOKENS.values())
SPECIAL_TOKENS = (*REQUIRED_TOKENS, *SPARE_TOKENS)

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] | trim | lower }}"
    "{% elif message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<boi><image><eoi>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] != 'image' %}{{ ' ' + part['text'] | trim | lower }}{% endfor %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<boi><image><eoi>' }}"
    "{% else %}{{ ' ' + part['text'] | trim | lower }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def class_token(number: int) -> str:
    """The special token of a class; the text tokenizer of a model that draws classes is trained with them."""
    return f"<class:{number}>"


def normalize_text(text: str) -> str:
    """Text as the model reads it: lower case, single spaces, opening with one."""
    return " " + " ".join(text.lower().split())


class ChatTemplate:
    """Documents as ids and back. positions: how many stand for a picture, by the generator that writes it, and words:
    how many of them, the first, for the text before it; begins: the begin tokens of generators that are known
    already; classes: the names of those that the model draws, if it does."""

    reader = CONTEXT_GENERATOR
    candidates = 16
    variable_size = False
    scales = 1
    system = False

    def __init__(
        self,
        tokenizer: Any,
        positions: Mapping[str, int],
        begins: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
        text_lengths: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.positions, self.text_lengths = dict(positions), dict(text_lengths or {})
        self.classes = tuple(classes)
        self.settings: dict[str, Any] = {}
        outputs: tuple[Output, ...] = tuple(name for name in OUTPUTS if name != "pair" or self.text_lengths)
        self.outputs = ("image",) if classes else outputs
        begins = BEGIN_TOKENS | dict(begins or {})
        needed = [*REQUIRED_TOKENS, *begins.values(), *map(class_token, range(len(self.classes)))]
        known = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL_TOKENS, *needed)}
        self.special = {name: id for name, id in known.items() if id not in (None, tokenizer.unk_token_id)}
        if missing := [name for name in needed if name not in self.special]:
            raise ValueError(
                f"the text tokenizer has no {', '.join(missing)}: train a new one (data_tools/train_tokenizer.py)"
            )
        self.start: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.turn_ends: tuple[int, ...] = (self.eos_id,)
        self.image_end_id: int = self.special[EOI]
        spare_tokens = [name for name in SPARE_TOKENS if name in self.special and name not in begins.values()]
        if len(new_names := [name for name in positions if name not in begins]) > len(spare_tokens):
            raise ValueError(
                f"no begin token is left for {', '.join(new_names)}: the text tokenizer has "
                f"{len(spare_tokens)} spare ones; "
                f"teach fewer ways of writing, or begin with a new text tokenizer (leave init_from out)"
            )
        begins |= dict(zip(new_names, spare_tokens, strict=False))
        self.begins: dict[str, int] = {name: self.special[begins[name]] for name in positions}

    def encode(self, document: Document, *, blind: bool = False, writer: str = CONTEXT_GENERATOR) -> Tokens:
        """A whole chat, its last turn ended where the assistant speaks last.

        writer: the generator that writes the assistant's last picture. Where it is not the one that pictures are read
        back by, the chat ends with that picture, since nothing later would see it as it was written.
        """
        if writer != CONTEXT_GENERATOR:
            said = [i for i, s in enumerate(document.segments) if s.image is not None and s.role == "assistant"]
            assert said, "no picture is written in this chat"
            return self._turns(Document(document.segments[: said[-1] + 1]), blind, writer)
        tokens = self._turns(document, blind)
        if document.segments[-1].role == "assistant":
            tokens.add([self.eos_id], loss=not blind)
        return tokens

    def layout(self, grid: tuple[int, int]) -> Layout:
        return Layout(grid, closing=(self.image_end_id,))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        return center_crop_resize(image, size)

    def prefix(self, ids: Sequence[int]) -> int:
        return 0

    def prompt(self, document: Document, *, output: Output = "image", blind: int = 0) -> Tokens:
        """A chat up to where the assistant goes on, whether it has begun its answer or not, whatever is asked for."""
        tokens = self._turns(document, bool(blind))
        if document.segments[-1].role == "user":
            tokens.add([self.special[ASSISTANT]])
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, as the user reads it."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _turns(self, document: Document, blind: bool, writer: str = CONTEXT_GENERATOR) -> Tokens:
        tokens = Tokens()
        tokens.add([self.start])
        role, after_text = None, False
        for number, segment in enumerate(images_first(document.segments), start=1):
            if segment.role == "system":
                raise ValueError("this model follows no system messages: leave them out")
            if segment.role != role:
                after_text = False
                if role == "assistant":
                    tokens.add([self.eos_id], loss=not blind)
                role = segment.role
                tokens.add([self.special[USER if role == "user" else ASSISTANT]])
            learnt = role == "assistant"
            if segment.image is not None:
                last = number == len(document.segments)
                name = writer if last else CONTEXT_GENERATOR
                tokens.add([self.begins[name]], loss=learnt and not blind)
                tokens.add_image(segment.image, self.positions[name], loss=learnt, writer=name)
                if name in self.text_lengths:
                    start = tokens.spans[-1][0]
                    tokens.ids[start : start + self.text_lengths[name]] = self.prefix_text_ids(document, name)
                if name == CONTEXT_GENERATOR:
                    tokens.add([self.image_end_id])
            elif blind:
                tokens.add([] if after_text else [self.special[UNCOND]])  # one for the whole run of text
            elif segment.label is not None:
                tokens.add([self.special[class_token(self.number(segment.label))]])
            elif self.classes:
                raise ValueError(f"this model draws classes, not words: give {self.describe_classes()}")
            else:
                tokens.add(self.text_ids(segment.text or ""), loss=learnt)
            after_text = segment.image is None
        return tokens

    def prefix_text_ids(self, document: Document, writer: str) -> list[int]:
        """The ids of the last text, cut or filled up with ends of turn to the positions that this generator has."""
        said = [self.text_ids(segment.text) for segment in document.segments if segment.text]
        ids = said[-1][: self.text_lengths[writer]] if said else []
        return ids + [self.eos_id] * (self.text_lengths[writer] - len(ids))

    def number(self, label: int | str) -> int:
        """Of a class, by its number or name. Raises ValueError naming the classes there are."""
        if not self.classes:
            raise ValueError("this model draws words, not classes: say what to draw in words")
        if label in self.classes:
            return self.classes.index(str(label))
        number = int(label) if str(label).isdecimal() else -1
        if not 0 <= number < len(self.classes):
            raise ValueError(f"unknown class {label!r}: give {self.describe_classes()}")
        return number

    def describe_classes(self) -> str:
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return f"a class from 0 to {len(self.classes) - 1}, or its name ({names})"

    def text_ids(self, text: str) -> list[int]:
        """Ids of one run of text; a special token's name typed by a user is text, never the token."""
        return self.tokenizer(normalize_text(text), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def build_model(
    lm: Any,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    text_size: int,
    writers: Sequence[str] = (CONTEXT_GENERATOR,),
    heads: Sequence[Any] = (),
    begins: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    later: Mapping[str, Callable[[], Any]] | None = None,
) -> UnifiedModel:
    """A model of its parts. The language model's table must hold text_size rows and then one for each image code.

    writers: the generators of pictures that the model has learnt, or shall learn; heads: those of them that are made
    already, because they have weights or a tokenizer of their own; begins: the begin tokens that were given to them;
    classes: names of what the model draws, where it draws classes and not words; later: what makes generators that are
    not made yet and whose pictures take no positions.
    """
    vocabulary = Vocabulary(text_size, codebook_size(image_tokenizer))
    rows = lm.get_input_embeddings().weight.shape[0]
    if rows != vocabulary.size:
        raise ValueError(
            f"the language model has {rows} rows, but text ({text_size}) and image codes "
            f"({image_tokenizer.codebook_size}) need {vocabulary.size}"
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    context, heads_by_name = build_context(lm, tokenizer, image_tokenizer), {head.name: head for head in heads}
    for head in heads:
        if head.tokenizer is not None and head.tokenizer.image_size != image_tokenizer.image_size:
            sizes = f"{head.tokenizer.image_size} pixels, the model's {image_tokenizer.image_size}"
            raise ValueError(f"the tokenizer of {head.name} is for pictures of {sizes}: train one for that size")
    names, later = dict.fromkeys([*writers, *heads_by_name]), later or {}
    built: dict[str, Generator] = {
        name: heads_by_name[name] if name in heads_by_name else build_generator(name, context)
        for name in names
        if name not in later
    }
    positions = {name: built[name].positions() if name in built else 0 for name in names}
    text_lengths = {name: generator.text_length for name, generator in built.items() if generator.text_length}
    template = ChatTemplate(tokenizer, positions, begins, classes, text_lengths)
    text: Generator = Text(sorted({*tokenizer.all_special_ids, *template.special.values()}))
    ordered = GeneratorDict({text.name: text} | {name: built.get(name) for name in names}, later)
    return UnifiedModel("tiny", Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, ordered)


def codebook_size(image_tokenizer: Any) -> int:
    """Of the tokenizer by which a model reads pictures. Raises ValueError where it has not one code a place."""
    if not hasattr(image_tokenizer, "codebook_size") or hasattr(getattr(image_tokenizer, "quantizer", None), "scales"):
        raise ValueError("pictures are read by one code a place: image_tokenizer must be of kind vq, of one scale")
    return int(image_tokenizer.codebook_size)


def build_context(lm: Any, tokenizer: Any, image_tokenizer: ImageTokenizer) -> BuildContext:
    """What generators of a model of these parts are made for."""
    width = int(lm.config.get_text_config().hidden_size)
    known = tokenizer.convert_tokens_to_ids([name for name in SPECIAL_TOKENS if name in tokenizer.get_vocab()])
    specials = tuple(sorted({*tokenizer.all_special_ids, *known} - {tokenizer.eos_token_id}))
    return BuildContext(image_tokenizer.grid, tokenizer.convert_tokens_to_ids(MASK), width, special_ids=specials)


def build_generator(name: str, frame: BuildContext) -> Generator:
    """An untrained generator. Raises ValueError for an unknown name, or where it needs a tokenizer and has none."""
    kind = generators.find_generator(name)
    if kind.own is not None and frame.tokenizer is None:
        kind_option = "kind=kl" if kind.own == "kl" else f"model.quantizer={kind.own}"
        raise ValueError(
            f"{name} needs an image tokenizer of its own: unigen train recipes/tiny_vq.py {kind_option} makes one"
        )
    generator: Generator = kind.of(frame)
    return generator


def build_from_config(
    lm_config: Any,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    writers: Sequence[str] = (CONTEXT_GENERATOR,),
    heads: Sequence[Any] = (),
    classes: Sequence[str] = (),
) -> UnifiedModel:
    """A new model with random weights (seed torch first): `lm_config` is any decoder-only `transformers` config."""
    from transformers import AutoModelForCausalLM

    lm_config.vocab_size = len(tokenizer) + codebook_size(image_tokenizer)
    lm_config.pad_token_id, lm_config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    lm_config.eos_token_id = tokenizer.eos_token_id
    lm = AutoModelForCausalLM.from_config(lm_config, attn_implementation="sdpa")
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer), writers, heads, classes=classes)


def causal_lm(model: UnifiedModel) -> Any:
    """It is one: codes are further rows of its table."""
    return model.backbone.lm


def add_generators(model: UnifiedModel, writers: Sequence[str], heads: Sequence[Any] = ()) -> UnifiedModel:
    """The same parts as a model that writes pictures in these ways too; training has to follow."""
    parts = model.backbone.lm, model.text_tokenizer, model.image_tokenizer, model.vocabulary.text_size
    names = [name for name in dict.fromkeys([*model.generators, *writers]) if name != "text"]
    built = dict(model.heads) | {head.name: head for head in heads}
    extended_model = build_model(*parts, names, list(built.values()), model.begin_tokens(), model.template.classes)
    extended_model.sampling = dict(model.sampling)
    return extended_model


def extend_vocabulary(lm: Any, tokenizer: Any, image_tokenizer: ImageTokenizer) -> UnifiedModel:
    """A pretrained language model and its tokenizer, grown by our specials and the image codes (Liquid's layout).

    New rows start as draws around the mean of the old ones (`mean_resizing`).
    """
    missing = {"bos_token": text_tokenizers.BOS, "eos_token": text_tokenizers.EOS, "pad_token": text_tokenizers.PAD}
    tokenizer.add_special_tokens({k: v for k, v in missing.items() if getattr(tokenizer, k) is None})
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS)}, replace_extra_special_tokens=False
    )
    lm.resize_token_embeddings(len(tokenizer) + image_tokenizer.codebook_size, mean_resizing=True)
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer))


def owns(folder: Path, config: Mapping[str, Any]) -> bool:
    """Its folders say so in their unigen.json."""
    return False


def load(folder: Path, dtype: torch.dtype | None = None, inference: bool = False) -> UnifiedModel:
    """The model saved in `folder`, strictly: no tensor missing, none left over.

    Args:
        dtype: None is float32.
        inference: may it be a model that only reads and answers? transformers is then not imported where its language
            model is a Llama, and generators with weights are loaded when they are first asked for.
    """
    manifest = hub.read_json(folder / hub.MANIFEST)
    image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    state = hub.read_tensors(folder / "model.safetensors")
    config = hub.read_json(folder / hub.CONFIG)
    lm: Any
    if inference and InferenceLlama.readable(config):
        tokenizer: Any = text_tokenizers.InferenceTokenizer(folder)
        lm = InferenceLlama(config)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = text_tokenizers.load_from_model(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if lm.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    hub.load_strict(lm, state, folder / "model.safetensors")
    writers = [name for name in manifest["generators"] if name != "text"]
    context = build_context(lm, tokenizer, image_tokenizer)
    generator_classes = {name: generators.find_generator(name) for name in writers}
    with_weights = [name for name, kind in generator_classes.items() if issubclass(kind, nn.Module)]
    later = {
        name: partial(load_generator_lazily, folder / name, context)
        for name in with_weights
        if inference and not generator_classes[name].uses_positions and (folder / name).is_dir()
    }
    heads = [load_generator(folder / name, context) for name in with_weights if name not in later]
    begins, classes = manifest.get("begins"), manifest.get("classes", ())
    text_size = int(manifest["text_size"])
    model = build_model(lm.float(), tokenizer, image_tokenizer, text_size, writers, heads, begins, classes, later)
    return model.to(dtype or torch.float32)


def load_generator_lazily(folder: Path, frame: BuildContext) -> Any:
    """The same as `load_generator`, when the model is long loaded."""
    with hub.wrap_load_errors(folder):
        return load_generator(folder, frame)


load_for_inference = partial(load, inference=True)


def load_generator(folder: Path, frame: BuildContext) -> Any:
    """A generator with weights, saved by `UnifiedModel.save`; the folder has its name."""
    settings = hub.read_json(folder / "config.json")
    tokenizer = load_image_tokenizer(folder / "tokenizer") if generators.find_generator(folder.name).own else None
    head: Any = build_generator(folder.name, replace(frame, tokenizer=tokenizer, settings=settings))
    frozen = {} if tokenizer is None else {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    hub.load_strict(head, frozen | hub.read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    return head
