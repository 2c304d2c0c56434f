"""The chat template of models assembled here: special tokens, and documents as ids and back.

    <s><user> two apples on a blue background<assistant><boi> 64 codes <eoi></s>
    <s><user><boi> 64 codes <eoi> how many apples?<assistant> two</s>

A document is a chat. The loss is on the assistant's tokens. The pictures of a user's message precede its words, in
whatever order they were given, since models were trained on that order. In the unconditional rendering, the second
branch of guidance, every run of text is the one token <uncond> while the images stay: this is also what training uses
where it drops captions. A model may generate images by class instead of from text:

    <s><user><class:7><assistant><boi> 64 codes <eoi></s>

Text is lower case and each run begins with a space, so that a word has the same ids wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unigen.batch import Layout, Tokens
from unigen.document import Document
from unigen.media.pixels import center_crop_resize
from unigen.model.template import OUTPUTS, Output, images_first, touched_cells
from unigen.options import DEFAULT_GENERATOR

USER, ASSISTANT, BOI, EOI = "<user>", "<assistant>", "<boi>", "<eoi>"
IMAGE, UNCOND, MASK = "<image>", "<uncond>", "<mask>"
BEGIN_TOKENS = {DEFAULT_GENERATOR: BOI, "next-scale": "<boi:scale>", "masked": "<boi:masked>", "flow": "<boi:flow>"}
"""The begin token of each generator, which tells the backbone the generator of the image. Generators that
are not listed get a spare token."""
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
    """The special token of a class. The text tokenizer of a class-conditional model is trained with these."""
    return f"<class:{number}>"


def normalize_text(text: str) -> str:
    """Text as the model reads it: in lower case, with single spaces and one in front."""
    return " " + " ".join(text.lower().split())


class ChatTemplate:
    """Lays documents out as ids and reads ids as text; a `Template`."""

    context_generator = DEFAULT_GENERATOR
    num_candidates = 16
    variable_size = False
    num_guidance_scales = 1
    supports_system = False

    def __init__(
        self,
        tokenizer: Any,
        image_lengths: Mapping[str, int],
        begin_tokens: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
        text_lengths: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: the text tokenizer, with the special tokens.
            image_lengths: positions of a picture, by generator.
            begin_tokens: begin tokens that generators have already, by generator.
            classes: names of the classes, where the model generates images by class and not from text.
            text_lengths: how many of a picture's positions, the first, hold text, by generator.

        Raises:
            ValueError: the tokenizer lacks special tokens, or has no begin token left for a generator.
        """
        self.tokenizer = tokenizer
        self.image_lengths, self.text_lengths = dict(image_lengths), dict(text_lengths or {})
        self.classes = tuple(classes)
        self.settings: dict[str, object] = {}
        outputs: tuple[Output, ...] = tuple(name for name in OUTPUTS if name != "joint" or self.text_lengths)
        self.outputs = ("image",) if classes else outputs
        begin_tokens = BEGIN_TOKENS | dict(begin_tokens or {})
        required_tokens = [*REQUIRED_TOKENS, *begin_tokens.values(), *map(class_token, range(len(self.classes)))]
        token_ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL_TOKENS, *required_tokens)}
        self.special_ids = {name: id for name, id in token_ids.items() if id not in (None, tokenizer.unk_token_id)}
        if missing := [name for name in required_tokens if name not in self.special_ids]:
            raise ValueError(
                f"the text tokenizer has no {', '.join(missing)}: train a new one (data_tools/train_tokenizer.py)"
            )
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.stop_token_ids: tuple[int, ...] = (self.eos_id,)
        self.image_end_id: int = self.special_ids[EOI]
        spare_tokens = [name for name in SPARE_TOKENS if name in self.special_ids and name not in begin_tokens.values()]
        if len(new_names := [name for name in image_lengths if name not in begin_tokens]) > len(spare_tokens):
            raise ValueError(
                f"no begin token is left for {', '.join(new_names)}: the text tokenizer has "
                f"{len(spare_tokens)} spare ones; "
                f"train fewer generators, or begin with a new text tokenizer (leave init_from out)"
            )
        begin_tokens |= dict(zip(new_names, spare_tokens, strict=False))
        self.begin_ids: dict[str, int] = {name: self.special_ids[begin_tokens[name]] for name in image_lengths}

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole chat for training. Its last turn is ended where it is the assistant's.

        Args:
            document: the chat.
            uncond: lay it out for the unconditional branch of guidance, without its words.
            generator: name of the generator of the assistant's last image. Where it is not DEFAULT_GENERATOR, the chat
                ends with that image, since nothing after it could attend to the image as it was generated.
        """
        if generator != DEFAULT_GENERATOR:
            image_indices = [
                i for i, s in enumerate(document.segments) if s.image is not None and s.role == "assistant"
            ]
            assert image_indices, "the chat has no image of the assistant"
            return self._dialogue(Document(document.segments[: image_indices[-1] + 1]), uncond, generator)
        tokens = self._dialogue(document, uncond)
        if document.segments[-1].role == "assistant":
            tokens.add([self.eos_id], loss=not uncond)
        return tokens

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of h x w codes among ids: codes in raster order, then EOI."""
        return Layout(grid, suffix=(self.image_end_id,))

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Pixels (size, size, 3), uint8, of the centre of a picture."""
        return center_crop_resize(image, size)

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        """0: attention is causal."""
        return 0

    def prompt(self, document: Document, *, output: Output = "image", branch: int = 0) -> Tokens:
        """Lay out a chat up to where the assistant goes on.

        Args:
            document: the chat; the assistant may have begun its answer.
            output: not used.
            branch: guidance branch: 0 has the whole prompt, 1 the images alone.
        """
        tokens = self._dialogue(document, bool(branch))
        if document.segments[-1].role == "user":
            tokens.add([self.special_ids[ASSISTANT]])
        return tokens

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        """The codes, bool (h, w), of which the mask marks any pixel."""
        return touched_cells(mask, grid)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _dialogue(self, document: Document, uncond: bool, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Turns of a chat, with the last picture, if it ends the chat, in the layout of `generator`."""
        tokens = Tokens()
        tokens.add([self.bos_id])
        role, after_text = None, False
        for number, segment in enumerate(images_first(document.segments), start=1):
            if segment.role == "system":
                raise ValueError("this model follows no system messages: leave them out")
            if segment.role != role:
                after_text = False
                if role == "assistant":
                    tokens.add([self.eos_id], loss=not uncond)
                role = segment.role
                tokens.add([self.special_ids[USER if role == "user" else ASSISTANT]])
            has_loss = role == "assistant"
            if segment.image is not None:
                is_last = number == len(document.segments)
                generator_name = generator if is_last else DEFAULT_GENERATOR
                tokens.add([self.begin_ids[generator_name]], loss=has_loss and not uncond)
                tokens.add_image(
                    segment.image, self.image_lengths[generator_name], loss=has_loss, handler=generator_name
                )
                if generator_name in self.text_lengths:
                    start = tokens.spans[-1][0]
                    tokens.ids[start : start + self.text_lengths[generator_name]] = self.prefix_text_ids(
                        document, generator_name
                    )
                if generator_name == DEFAULT_GENERATOR:
                    tokens.add([self.image_end_id])
            elif uncond:
                tokens.add([] if after_text else [self.special_ids[UNCOND]])  # one for the whole run of text
            elif segment.label is not None:
                tokens.add([self.special_ids[class_token(self.class_index(segment.label))]])
            elif self.classes:
                raise ValueError(f"this model generates images by class, not from text: give {self.describe_classes()}")
            else:
                tokens.add(self.text_ids(segment.text or ""), loss=has_loss)
            after_text = segment.image is None
        return tokens

    def prefix_text_ids(self, document: Document, generator: str) -> list[int]:
        """The ids of the last text of a document, cut or filled with ends of turn to the generator's positions of text.

        Args:
            document: the chat.
            generator: one of `text_lengths`.
        """
        runs_of_ids = [self.text_ids(segment.text) for segment in document.segments if segment.text]
        ids = runs_of_ids[-1][: self.text_lengths[generator]] if runs_of_ids else []
        return ids + [self.eos_id] * (self.text_lengths[generator] - len(ids))

    def class_index(self, label: int | str) -> int:
        """The index of a class.

        Args:
            label: its number or its name.

        Raises:
            ValueError: there is no such class; the message names those there are.
        """
        if not self.classes:
            raise ValueError("this model generates images from text, not by class: describe the image in words")
        if label in self.classes:
            return self.classes.index(str(label))
        number = int(label) if str(label).isdecimal() else -1
        if not 0 <= number < len(self.classes):
            raise ValueError(f"unknown class {label!r}: give {self.describe_classes()}")
        return number

    def describe_classes(self) -> str:
        """A phrase for error messages that lists the classes."""
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return f"a class from 0 to {len(self.classes) - 1}, or its name ({names})"

    def text_ids(self, text: str) -> list[int]:
        """Ids of one run of text. The name of a special token that a user types is text, never the token."""
        return self.tokenizer(normalize_text(text), add_special_tokens=False, split_special_tokens=True)["input_ids"]
