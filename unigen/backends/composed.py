"""A model that reads and reasons with one that draws, behind the interface of `Engine`, joined by prompts, or
by hidden states where an adapter is given (`unigen.backends.connector`).

    engine = unigen.load(lmm="Qwen/Qwen3-VL-2B-Instruct", generator="stable-diffusion-v1-5/stable-diffusion-v1-5")
    engine.describe(image)                                  # the one that reads
    engine.generate("a shiba inu")                          # the one that draws
    engine.edit(image, "put it in the snow")                # the first says what the second shall draw of the picture
    engine.generate("a story about a witch", "interleaved") # a passage, what its picture shows, the picture; and so on

Either may be a model of this package's families; the one that reads may also be any model of transformers with a chat
template, the one that draws any diffusers pipeline. Does not depend on: how either does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from unigen.backends.connector import ConnectedDiffusersEngine, Connector, require_pipeline
from unigen.backends.diffusers_engine import check_prompt_text, check_seed
from unigen.document import Document, Segment, as_text
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import load_pretrained, silence_transformers
from unigen.inference.request import zip_with_seeds
from unigen.limits import check_limit
from unigen.media.display import MediaList, table_html
from unigen.media.images import read_image
from unigen.model.template import Output, UnsupportedError, split_system_messages
from unigen.models import to_float32
from unigen.nn.quantized import count_parameters, describe_precision, quantize
from unigen.samplers.logits import SamplingOptions
from unigen.samplers.seeds import derive_seed, make_rng, offset_seed
from unigen.tokenizers import text
from unigen.utils import progress
from unigen.utils.numbers import NonFiniteError
from unigen.utils.text import first_line

IMAGE_PROMPT_INSTRUCTION = (
    "Say in one sentence what the picture that is asked for shows, as a prompt for a painter. Only the sentence."
)
PASSAGE_INSTRUCTION = "Write only the next short passage of it, in one to three sentences. Leave pictures out."
ILLUSTRATION_INSTRUCTION = (
    "Say in one sentence what a picture of the last passage shows, as a prompt for a painter. Only the sentence."
)
MAX_PASSAGE_TOKENS = 120
"""Tokens of a passage, and of a prompt for the painter, where `max_tokens` does not say less."""
TEXT_OPTIONS = ("max_tokens", "temperature", "top_p")
"""Options of the model that reads, wherever it says something; all others are of the one that draws."""
STORY_TEMPERATURE = 0.8
"""Of the passages of a model of this package's families, as in its own stories."""
FALLBACK_SAMPLING = {"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.1}
"""How a model of transformers draws text whose generation_config does not say: greedily it would repeat itself."""
DUPLICATE_RATIO, MAX_RETRIES = 0.9, 3
"""How alike two passages are, by difflib's ratio, that are one told twice; and how often another is asked for."""


class ComposedEngine:
    """lmm: answers a document with text; painter: draws words, and edits pictures where it can; adapter: tells it what
    the lmm reads by hidden states (`unigen.backends.connector`). joined: is it told so, and no picture has to be put
    into words?
    """

    outputs: tuple[Output, ...] = ("image", "text", "interleaved")
    one_by_one = True
    """Are several answers made one after another, and not together?"""

    def __init__(self, lmm: Any, painter: Any, adapter: Connector | None = None) -> None:
        if "text" not in lmm.outputs:
            raise ValueError("the model given as lmm does not answer with text: give one that reads and writes")
        if "image" not in painter.outputs:
            raise ValueError("the model given as generator does not draw: give one that does")
        self.lmm = lmm
        self.painter = painter if adapter is None else ConnectedDiffusersEngine(require_pipeline(painter), lmm, adapter)
        self.joined = bool(getattr(self.painter, "sees", False))

    def generate(self, prompt: Any, output: Output = "image", *, n: int = 1, seed: int = 0, **options: Any) -> Any:
        """A PIL image, a string, or for "interleaved" a list of both; n > 1 gives a list of answers."""
        n, seed = check_limit("n", n), check_seed(seed)
        answers = [self._answer(prompt, output, offset_seed(seed, i), options) for i in range(n)]
        return answers[0] if n == 1 else MediaList(answers)

    def generate_batch(
        self, prompts: Sequence[Any], seeds: Sequence[int] | None = None, output: Output = "image", **options: Any
    ) -> list[Any]:
        """One answer a prompt."""
        return MediaList(self._answer(p, output, s, options) for p, s in zip_with_seeds(prompts, seeds))

    def stream(self, prompt: Any, output: Output = "interleaved", *, seed: int = 0, **options: Any) -> Iterator[Any]:
        """The parts of one answer as they are made. Raises ValueError at once for bad input."""
        self.check(prompt, output, seed=seed, **options)
        if output == "interleaved":
            return self._told(Document.of(prompt), seed, options)
        return map(lambda _: self._answer(prompt, output, seed, options), range(1))

    def check(self, prompt: Any, output: Output, *, seed: int = 0, **options: Any) -> None:
        """Raises ValueError in one line for what either of the two would refuse, before anything is made."""
        if output not in self.outputs:
            raise ValueError(f"this pair cannot answer with {output}: it can with {' or '.join(self.outputs)}")
        check_seed(seed)
        document, text_info, image_options = Document.of(prompt), self.text_options(options), self._drawing(options)
        document.check_conditions("a composed model")
        if output == "text" and image_options:
            accepted = f"it takes {', '.join(TEXT_OPTIONS)}"
            raise ValueError(
                f"the model that reads does not take {', '.join(image_options)}: leave that out ({accepted})"
            )
        if output == "interleaved":
            check_limit("max_images", image_options.pop("max_images", 4))
        if output == "image":
            document.segments = split_system_messages(document.segments)[1]
            if self.joined or not document.images():  # the one that reads says nothing
                self.painter.check(document, "image", **options)
                return
        self.lmm.check(document, "text", **text_info)
        if output != "text":
            self.painter.check("a", "image", **image_options)

    def describe(self, image: Any, question: str | None = None, *, seed: int = 0, **options: Any) -> str:
        asked = [read_image(image), as_text(question or "Describe this picture.")]
        return str(self._answer(asked, "text", seed, options))

    def edit(self, image: Any, instruction: str, *, seed: int = 0, **options: Any) -> Any:
        """The picture changed as the instruction says: what it shall show is said by the one that reads."""
        check_prompt_text("the instruction", instruction, "say what to change")
        picture = read_image(image)
        said, own = instruction, options
        if not self.joined:
            asked, own = [picture, as_text(instruction), IMAGE_PROMPT_INSTRUCTION], self._drawing(options)
            said = self._generate_text(asked, seed, options, MAX_PASSAGE_TOKENS)
        try:
            return self.painter.edit(picture, said, seed=seed, **own)
        except UnsupportedError:  # it draws the new picture whole
            words = as_text(said)
            return self.painter.generate([picture, words] if self.joined else words, "image", seed=seed, **own)

    def inpaint(self, image: Any, prompt: str, mask: Any, **options: Any) -> Any:
        return self.painter.inpaint(image, prompt, mask, **options)

    def info(self) -> dict[str, Any]:
        text_info = self.lmm.info()
        facts = {"outputs": list(self.outputs), "system": text_info.get("system", False)}
        return facts | {"reads": text_info, "draws": self.painter.info()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lmm={self.lmm!r}, generator={self.painter!r})"

    def _repr_html_(self) -> str:
        return table_html(type(self).__name__, self.info())

    # ---------------------------------------------------------------- how it is done

    @property
    def text_sampling(self) -> dict[str, Any]:
        """How the model that reads draws its text where nothing is asked for, as far as it says."""
        return dict(getattr(self.lmm, "text_sampling", {}))

    def text_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """What the model that reads is told: its own of the options, over how it draws text where nothing is asked."""
        given = {name: value for name, value in options.items() if name in TEXT_OPTIONS and value is not None}
        defaults = self.text_sampling
        return given if defaults == FALLBACK_SAMPLING and "temperature" in given else defaults | given

    def _answer(self, prompt: Any, output: Output, seed: int, options: dict[str, Any]) -> Any:
        self.check(prompt, output, seed=seed, **options)
        document = Document.of(prompt)
        if output == "text":
            return self._generate_text(document, seed, options)
        if output == "interleaved":
            with progress.bar(options.get("max_images", 4), "image") as bar:
                parts = MediaList()
                for part in self._told(document, seed, options):
                    parts.append(part)
                    bar.update(not isinstance(part, str))
            return parts
        document.segments = split_system_messages(document.segments)[1]
        if self.joined or not document.images():  # the one that reads says nothing
            return self.painter.generate(document, "image", seed=seed, **options)
        said = self._generate_text(
            Document([*document.segments, Segment(text=IMAGE_PROMPT_INSTRUCTION)]), seed, options, MAX_PASSAGE_TOKENS
        )
        return self.painter.generate(as_text(said), "image", seed=seed, **self._drawing(options))

    def _told(self, document: Document, seed: int, options: dict[str, Any]) -> Iterator[Any]:
        """Passages and their pictures, until a passage is empty, was told before or there are as many as asked for."""
        count, own = options.get("max_images", 4), self._drawing(options)
        own.pop("max_images", None)
        if not self.text_sampling and options.get("temperature") is None:
            options = options | {"temperature": STORY_TEMPERATURE}
        told: list[Segment] = list(document.segments)
        passages: list[str] = []
        for number in range(count):
            part_seed = derive_seed(seed, number, factor=1_000)
            for attempt in range(MAX_RETRIES):
                asked = Document([*told, Segment(text=PASSAGE_INSTRUCTION)])
                passage = trim_to_sentence(
                    self._generate_text(
                        asked, derive_seed(part_seed, attempt) if attempt else part_seed, options, MAX_PASSAGE_TOKENS
                    )
                )
                if not passage:
                    return
                if not is_repeated(passage, passages):
                    break
            else:
                return
            yield passage
            passages.append(passage)
            told.append(Segment(text=passage, role="assistant"))
            image_prompt = self._generate_text(
                Document([*told, Segment(text=ILLUSTRATION_INSTRUCTION)]), part_seed, options, MAX_PASSAGE_TOKENS
            )
            yield self.painter.generate(as_text(image_prompt or passage), "image", seed=part_seed, **own)

    def _generate_text(self, document: Any, seed: int, options: dict[str, Any], most: int | None = None) -> str:
        """most: tokens, where `max_tokens` does not say less."""
        text_options = self.text_options(options)
        if most is not None:
            text_options["max_tokens"] = min(most, text_options.get("max_tokens", most))
        return str(self.lmm.generate(Document.of(document), "text", seed=seed, **text_options)).strip()

    @staticmethod
    def _drawing(options: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name not in TEXT_OPTIONS}


def trim_to_sentence(passage: str) -> str:
    """The passage without a last sentence that was cut off by the limit of tokens. It is as it was where no sentence
    ends beyond its first third: the full stop of an abbreviation early in a passage is no end."""
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’»)*_]*(?=\s|$)", passage)]
    return passage[: ends[-1]] if ends and ends[-1] >= len(passage) / 3 else passage


def is_repeated(passage: str, passages: Sequence[str]) -> bool:
    """Is it one of the passages, or nearly so?"""
    return any(SequenceMatcher(None, passage, other, autojunk=False).ratio() >= DUPLICATE_RATIO for other in passages)


class TransformersEngine:
    """Any model of transformers with a chat template, as one that answers with text. text_sampling: how it draws text
    in a pair where nothing is asked for (`text_sampling_from`)."""

    outputs: tuple[Output, ...] = ("text",)

    def __init__(
        self,
        model: Any,
        processor: Any,
        sees: bool,
        quantization: str | None = None,
        text_sampling: dict[str, Any] | None = None,
    ) -> None:
        self.text_sampling = text_sampling or {}
        self.model, self.processor, self.sees, self.quantization = model.eval(), processor, sees, quantization

    @torch.inference_mode()
    def generate(
        self,
        prompt: Any,
        output: Output = "text",
        *,
        seed: int = 0,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
    ) -> str:
        """What the model answers; greedy where temperature is 0. top_k, repetition_penalty: None is as transformers and
        the model have it. Raises ValueError where it cannot see a picture."""
        self.check(prompt, output, seed=seed, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        inputs = self._build_inputs(Document.of(prompt)).to(self.model.device)
        sampling_kwargs: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling_kwargs = {"do_sample": True, "temperature": temperature, "top_p": top_p}
            sampling_kwargs |= {} if top_k is None else {"top_k": top_k}
        sampling_kwargs |= {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(make_rng(check_seed(seed)).initial_seed())
            ids = self.model.generate(
                **inputs, max_new_tokens=max_tokens, logits_processor=[self._check_finite], **sampling_kwargs
            )
        return str(self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def check(self, prompt: Any, output: Output = "text", *, seed: int = 0, **options: Any) -> None:
        """Raises ValueError in one line for what `generate` cannot answer. options: those of `generate`."""
        if output != "text":
            raise ValueError(f"this model cannot answer with {output}: it can with text")
        check_seed(seed)
        SamplingOptions(options.get("temperature", 0.0), 0, options.get("top_p", 1.0))
        check_limit("max_tokens", options.get("max_tokens", 1))
        self._check_segments(Document.of(prompt))

    def _check_segments(self, document: Document) -> None:
        """Raises ValueError for what the model cannot read."""
        document.check_conditions("this model")
        for segment in document.segments:
            if segment.label is not None:
                raise ValueError("this model reads words, not classes: say it in words")
            if segment.image is not None and not self.sees:
                raise ValueError("this model cannot see pictures: pair with one that can, or leave the picture out")

    def _check_finite(self, ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """The scores of the next id. Raises NonFiniteError where that would be an accident, or its scores are no
        numbers."""
        if not bool(scores_BV.amax(-1).isfinite().all()):
            raise NonFiniteError("scores", self.model.dtype)
        return scores_BV

    @torch.no_grad()
    def states(self, prompt: Any) -> torch.Tensor:
        """What the model reads of a document before it would answer, as states (S, D) after its last norm. Raises
        NonFiniteError where they are no numbers."""
        inputs = self._build_inputs(Document.of(prompt)).to(self.model.device)
        states_SD: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        if not bool(states_SD.isfinite().all()):
            raise NonFiniteError("states", self.model.dtype)
        return states_SD

    def _build_inputs(self, document: Document) -> Any:
        self._check_segments(document)
        messages: list[dict[str, Any]] = []
        told, segments = split_system_messages(document.segments)
        for segment in [Segment(text=told, role="system"), *segments] if told else segments:
            if not messages or messages[-1]["role"] != segment.role:
                messages.append({"role": segment.role, "content": []})
            if segment.image is not None:
                messages[-1]["content"].append({"type": "image", "image": read_image(segment.image)})  # type: ignore[arg-type]
            else:
                messages[-1]["content"].append({"type": "text", "text": segment.text})
        if not self.sees:
            for message in messages:
                message["content"] = "\n".join(part["text"] for part in message["content"])

        def render(messages: Any) -> str:
            return str(self.processor.apply_chat_template(messages, tokenize=False))

        return self.processor.apply_chat_template(
            text.merge_system_message(messages, render),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def info(self) -> dict[str, Any]:
        (count, size), model_class = count_parameters(self.model), self.model.config.model_type
        return {
            "family": "transformers",
            "model": f"{model_class}, {count / 1e6:.1f}M parameters",
            "sees": self.sees,
            "system": True,
            "text_sampling": self.text_sampling,
            "precision": describe_precision(self.model, self.quantization),
            "weights_mb": round(size / 1e6, 1),
        }


def load_transformers(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, quantization: str | None = None
) -> TransformersEngine:
    """The model of transformers in `folder`, strictly; no code of the folder is run. Raises ValueError in one line."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

    sees = str(read_json(folder / CONFIG).get("model_type")) in SEEING
    model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with silence_transformers():
            processor = load_processor(folder) if sees else text.load(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model folder {folder} cannot be loaded: {first_line(error)}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{folder} has no chat template: give a model that was tuned to chat")
    model = load_pretrained(model_class, folder, dtype)
    if torch.device(device).type == "cpu":
        to_float32(model, model)
    if quantization is not None:
        quantize(model.get_decoder(), quantization, device)
    return TransformersEngine(model.to(device), processor, sees, quantization, text_sampling_from(folder))


def text_sampling_from(folder: Path, fallback: dict[str, Any] | None = None) -> dict[str, Any]:
    """How a model draws text where nothing is asked for: by the generation_config.json of its folder where that says
    whether to sample, else by `fallback` (`FALLBACK_SAMPLING` where it is None), with the penalty that it names. Raises
    ValueError for numbers of the file that are out of their ranges."""
    path = folder / "generation_config.json"
    said = read_json(path) if path.is_file() else {}
    own = {name: said[name] for name in ("top_p", "top_k", "repetition_penalty") if said.get(name) is not None}
    if said.get("do_sample") is None:
        defaults = FALLBACK_SAMPLING if fallback is None else fallback
        own = defaults | {
            name: value for name, value in own.items() if name in defaults and name == "repetition_penalty"
        }
    elif said["do_sample"]:
        own = {"temperature": 1.0 if said.get("temperature") is None else said["temperature"]} | own
    else:
        own = {"temperature": 0.0} | {name: value for name, value in own.items() if name == "repetition_penalty"}
    try:
        SamplingOptions(**own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return own


def load_processor(folder: Path) -> Any:
    """The processor of a model of transformers that sees: its image processor, tokenizer and chat template. Videos are
    not read here, so its video processor, which needs torchvision, is left out."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    files = (folder / name for name in ("processor_config.json", "preprocessor_config.json", text.TOKENIZER_CONFIG))
    said = (read_json(path).get("processor_class") for path in files if path.is_file())
    name = next((name for name in said if name), None)
    model_class = getattr(transformers, name, None) if name else None
    model_class = model_class or PROCESSOR_MAPPING.get(
        type(AutoConfig.from_pretrained(folder, local_files_only=True)), None
    )
    if model_class is None:
        raise ValueError(f"transformers has no processor {name or 'of its type of model'}")
    processor = without_video_processor(model_class).from_pretrained(folder, local_files_only=True)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def without_video_processor(kind: Any) -> Any:
    """The processor class, its tokenizer loaded by `text.load` and its video processor None."""
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING as LOADERS

    def load_parts(cls: Any, folder: Path, *_: Any, **__: Any) -> list[Any]:
        parts: list[Any] = []
        for name in cls.get_attributes():
            if "tokenizer" in name:
                parts.append(text.load(folder))
            elif "video" in name:
                parts.append(None)
            else:
                parts.append(LOADERS[name].from_pretrained(folder, local_files_only=True))
        return parts

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    methods = {"_get_arguments_from_pretrained": classmethod(load_parts), "check_argument_for_proper_class": check}
    return type(kind.__name__, (kind,), methods)
