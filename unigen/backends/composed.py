"""A model that reads and answers with text, and one that generates images, composed into one engine. They are joined by
prompts, or by hidden states where a connector is given (`unigen.backends.connector`).

    engine = unigen.load(lmm="Qwen/Qwen3-VL-2B-Instruct", image_model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    engine.describe(image)                                  # the text engine
    engine.generate("a shiba inu")                          # the image engine
    engine.edit(image, "put it in the snow")                # the text engine writes a prompt, the image engine draws it
    engine.generate("a story about a witch", "interleaved") # a passage, the prompt of its image, the image; and so on

Either may be a model of this package's families; the text engine may also be any model of transformers with a chat
template, the image engine any diffusers pipeline. Does not depend on: how either generates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from PIL.Image import Image
from torch import Tensor

from unigen.backends.connector import ConnectedDiffusersEngine, Connector, require_pipeline
from unigen.backends.diffusers_engine import check_prompt_text, check_seed
from unigen.backends.transformers_engine import FALLBACK_SAMPLING
from unigen.document import Document, Preview, Prompt, Segment, as_text
from unigen.inference.base import BaseEngine, check_record
from unigen.inference.protocol import EngineInfo, InferenceEngine, OptionValue
from unigen.inference.request import zip_with_seeds
from unigen.inference.results import RECORD_NOTHING, GenerationResult, Record, Score
from unigen.media.display import MediaList
from unigen.media.images import ImageSource, read_image
from unigen.model.template import Output, UnsupportedError, split_system_messages
from unigen.samplers.seeds import derive_seed
from unigen.utils import progress
from unigen.utils.option_types import MAX_IMAGES as IMAGE_COUNT

IMAGE_PROMPT_INSTRUCTION = (
    "Say in one sentence what the picture that is asked for shows, as a prompt for a painter. Only the sentence."
)
PASSAGE_INSTRUCTION = "Write only the next short passage of it, in one to three sentences. Leave pictures out."
ILLUSTRATION_INSTRUCTION = (
    "Say in one sentence what a picture of the last passage shows, as a prompt for a painter. Only the sentence."
)
MAX_PASSAGE_TOKENS = 120
"""Tokens of a passage, and of an image's prompt, at most; a smaller `max_tokens` counts."""
MAX_IMAGES = 4
"""Images of an interleaved answer where the request has no `max_images`."""
TEXT_OPTIONS = ("max_tokens", "temperature", "top_p")
"""Options of the text engine, wherever it writes; all others are of the image engine."""
STORY_TEMPERATURE = 0.8
"""Temperature of passages where the text engine has no defaults, as models of this package's families."""
DUPLICATE_RATIO, MAX_RETRIES = 0.9, 3
"""The ratio of difflib from which two passages count as equal; how often a passage is generated again then."""


class ComposedEngine(BaseEngine):
    """Answers with text of one engine and images of another. Not safe to share between threads."""

    outputs: tuple[Output, ...] = ("image", "text", "interleaved")
    accepts_images = True

    def __init__(
        self, text_engine: InferenceEngine, image_engine: InferenceEngine, connector: Connector | None = None
    ) -> None:
        """Compose two engines.

        Args:
            text_engine: answers a document with text.
            image_engine: generates images of words, and edits images where it can.
            connector: conditions the image engine, a pipeline, on the hidden states of the text engine.

        Raises:
            ValueError: where either cannot do its part.
        """
        if "text" not in text_engine.outputs:
            raise ValueError("the model given as lmm does not answer with text: give one that reads and writes")
        if "image" not in image_engine.outputs:
            raise ValueError("the model given as generator does not draw: give one that does")
        self.text_engine = text_engine
        self.image_engine = (
            image_engine
            if connector is None
            else ConnectedDiffusersEngine(require_pipeline(image_engine), text_engine, connector)
        )
        self.uses_hidden_states = connector is not None
        """Whether the image engine is conditioned on the states of the whole prompt, so that no image is put into
        words."""

    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> list[GenerationResult]:
        """See `InferenceEngine.generate_results`. Ids are recorded of texts, and of images as the image engine does."""
        return [self._generate_one(p, output, s, record, options) for p, s in zip_with_seeds(prompts, seeds)]

    def stream(
        self, prompt: Prompt, output: Output = "interleaved", *, seed: int = 0, **options: OptionValue
    ) -> Iterator[str | Image | Preview]:
        """See `InferenceEngine.stream`."""
        self.check(prompt, output, seed=seed, **options)
        if output == "interleaved":
            return self._stream_story(Document.of(prompt), seed, options)
        return self._stream_whole(prompt, output, seed, options)

    def check(self, prompt: Prompt, output: Output, *, seed: int = 0, **options: Any) -> None:
        """See `InferenceEngine.check`: what either engine would refuse."""
        if output not in self.outputs:
            raise ValueError(f"this pair cannot answer with {output}: it can with {' or '.join(self.outputs)}")
        check_seed(seed)
        document = Document.of(prompt)
        document.check_conditions("a composed model")
        text_options, image_options = self._text_options(options), _image_options(options)
        if output == "text" and image_options:
            accepted = f"it takes {', '.join(TEXT_OPTIONS)}"
            raise ValueError(
                f"the model that reads does not take {', '.join(image_options)}: leave that out ({accepted})"
            )
        if output == "interleaved":
            IMAGE_COUNT.check("max_images", image_options.pop("max_images", MAX_IMAGES))
        if output == "image":
            document.segments = split_system_messages(document.segments)[1]
            if self._draws_directly(document):
                self.image_engine.check(document, "image", **options)
                return
        self.text_engine.check(document, "text", **text_options)
        if output != "text":
            self.image_engine.check("a", "image", **image_options)

    def describe(
        self, image: ImageSource, question: str | None = None, *, seed: int = 0, **options: OptionValue
    ) -> str | list[str]:
        """See `InferenceEngine.describe`."""
        document = Document.of([read_image(image), as_text(question or "Describe this picture.")])
        return str(self._generate_one(document, "text", seed, Record(), options).output)

    def edit(self, image: ImageSource, instruction: str, *, seed: int = 0, **options: Any) -> Image | list[Image]:
        """See `InferenceEngine.edit`. The text engine says what the edited image shows; an image engine that does not
        edit draws that anew."""
        check_prompt_text("the instruction", instruction, "say what to change")
        picture = read_image(image)
        prompt, image_options = instruction, options
        if not self.uses_hidden_states:
            document = Document.of([picture, as_text(instruction), IMAGE_PROMPT_INSTRUCTION])
            image_options = _image_options(options)
            prompt = self._generate_text(document, seed, options, MAX_PASSAGE_TOKENS)
        try:
            return self.image_engine.edit(picture, prompt, seed=seed, **image_options)
        except UnsupportedError:
            words = as_text(prompt)
            segments: Prompt = [picture, words] if self.uses_hidden_states else words
            return self.image_engine.generate(segments, "image", seed=seed, **image_options)

    def inpaint(
        self,
        image: ImageSource,
        prompt: str,
        mask: ImageSource | None = None,
        *,
        variation: float | None = None,
        **options: Any,
    ) -> Image | list[Image]:
        """See `InferenceEngine.inpaint`: of the image engine."""
        return self.image_engine.inpaint(image, prompt, mask, variation=variation, **options)

    def inpaint_window(self, mask: ImageSource) -> tuple[int, int, int, int] | None:
        """See `InferenceEngine.inpaint_window`: of the image engine."""
        return self.image_engine.inpaint_window(mask)

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """See `InferenceEngine.score`: of the text engine."""
        return self.text_engine.score(documents, per_token=per_token)

    def hidden_states(self, prompt: Prompt) -> Tensor:
        """See `InferenceEngine.hidden_states`: of the text engine."""
        return self.text_engine.hidden_states(prompt)

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        text_info = self.text_engine.info()
        return {
            "outputs": list(self.outputs),
            "system": text_info.get("system", False),
            "text_model": text_info,
            "image_model": self.image_engine.info(),
        }

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """See `InferenceEngine.default_options`. What is used where a checkpoint does not say how its text is sampled
        makes way for a temperature that is given."""
        if output != "text":
            return self.image_engine.default_options("image", given)
        defaults = self.text_engine.default_options("text", given)
        return {} if defaults == FALLBACK_SAMPLING and "temperature" in (given or {}) else defaults

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lmm={self.text_engine!r}, image_model={self.image_engine!r})"

    # ---------------------------------------------------------------- how it is done

    def _draws_directly(self, document: Document) -> bool:
        """Whether the image engine takes the prompt as it is, and the text engine writes nothing."""
        return self.uses_hidden_states or not document.images()

    def _text_options(self, options: Mapping[str, OptionValue]) -> dict[str, Any]:
        """The options of the text engine: its defaults, and over them those of the request."""
        requested = {name: value for name, value in options.items() if name in TEXT_OPTIONS and value is not None}
        return self.default_options("text", requested) | requested

    def _generate_one(
        self, prompt: Prompt, output: Output, seed: int, record: Record, options: dict[str, Any]
    ) -> GenerationResult:
        self.check(prompt, output, seed=seed, **options)
        document = Document.of(prompt)
        if output == "text":
            return self._generate_text_result(document, seed, options, None, record)
        if output == "interleaved":
            check_record(record, Record(), "ask for a text or an image")
            with progress.bar(options.get("max_images", MAX_IMAGES), "image") as bar:
                parts = MediaList()
                for part in self._stream_story(document, seed, options):
                    parts.append(part)
                    bar.update(not isinstance(part, str))
            segments = [
                Segment(text=p, role="assistant") if isinstance(p, str) else Segment(image=p, role="assistant")
                for p in parts
            ]
            return GenerationResult(parts, Document([*document.segments, *segments]), seed, settings=dict(options))
        document.segments = split_system_messages(document.segments)[1]
        if not self._draws_directly(document):
            instruction = Segment(text=IMAGE_PROMPT_INSTRUCTION)
            image_prompt = self._generate_text(
                Document([*document.segments, instruction]), seed, options, MAX_PASSAGE_TOKENS
            )
            document, options = Document.of(as_text(image_prompt)), _image_options(options)
        (result,) = self.image_engine.generate_results([document], [seed], "image", record=record, **options)
        return result

    def _stream_story(self, document: Document, seed: int, options: dict[str, Any]) -> Iterator[str | Image | Preview]:
        """Passages and their images, until a passage is empty or a repetition, or there are `max_images`."""
        count, image_options = options.get("max_images", MAX_IMAGES), _image_options(options)
        image_options.pop("max_images", None)
        if not self.default_options("text") and options.get("temperature") is None:
            options = options | {"temperature": STORY_TEMPERATURE}
        story = list(document.segments)
        passages: list[str] = []
        for number in range(count):
            part_seed = derive_seed(seed, number, factor=1_000)
            passage = self._next_passage(story, passages, part_seed, options)
            if not passage:
                return
            yield passage
            passages.append(passage)
            story.append(Segment(text=passage, role="assistant"))
            instruction = Document([*story, Segment(text=ILLUSTRATION_INSTRUCTION)])
            image_prompt = self._generate_text(instruction, part_seed, options, MAX_PASSAGE_TOKENS)
            yield self.image_engine.generate(as_text(image_prompt or passage), "image", seed=part_seed, **image_options)

    def _next_passage(
        self, story: Sequence[Segment], passages: Sequence[str], seed: int, options: dict[str, Any]
    ) -> str:
        """A passage that repeats none of those before; "" where the story has ended."""
        document = Document([*story, Segment(text=PASSAGE_INSTRUCTION)])
        for attempt in range(MAX_RETRIES):
            attempt_seed = derive_seed(seed, attempt) if attempt else seed
            passage = trim_to_sentence(self._generate_text(document, attempt_seed, options, MAX_PASSAGE_TOKENS))
            if not passage or not is_repeated(passage, passages):
                return passage
        return ""

    def _generate_text(self, document: Document, seed: int, options: dict[str, Any], max_tokens: int) -> str:
        """The answer of the text engine. max_tokens: the limit where the options have no smaller one."""
        return str(self._generate_text_result(document, seed, options, max_tokens).output)

    def _generate_text_result(
        self,
        document: Document,
        seed: int,
        options: dict[str, Any],
        max_tokens: int | None = None,
        record: Record = RECORD_NOTHING,
    ) -> GenerationResult:
        text_options = self._text_options(options)
        if max_tokens is not None:
            text_options["max_tokens"] = min(max_tokens, text_options.get("max_tokens", max_tokens))
        (result,) = self.text_engine.generate_results([document], [seed], "text", record=record, **text_options)
        return result


def _image_options(options: Mapping[str, OptionValue]) -> dict[str, Any]:
    """The options of the image engine."""
    return {name: value for name, value in options.items() if name not in TEXT_OPTIONS}


def trim_to_sentence(passage: str) -> str:
    """Drop a last sentence that the limit of tokens cut off.

    Args:
        passage: a text.

    Returns:
        The text up to the end of its last whole sentence. It is as it was where no sentence ends beyond its first
        third, since the full stop of an abbreviation early in a passage is no end.
    """
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’»)*_]*(?=\s|$)", passage)]
    return passage[: ends[-1]] if ends and ends[-1] >= len(passage) / 3 else passage


def is_repeated(passage: str, passages: Sequence[str]) -> bool:
    """Whether a passage is nearly equal to another.

    Args:
        passage: a text.
        passages: others.

    Returns:
        True where difflib's ratio with any of them is at least `DUPLICATE_RATIO`.
    """
    return any(
        SequenceMatcher(None, passage, earlier, autojunk=False).ratio() >= DUPLICATE_RATIO for earlier in passages
    )
