"""Language models of transformers with a chat template, as an engine that answers with text.

    engine = load_transformers(folder)
    engine.generate("what is a fjord?", "text")

Does not depend on: composed models, diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unigen.document import Document, Prompt, Segment, as_text
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import load_pretrained, silence_transformers
from unigen.inference.base import BaseEngine, check_record
from unigen.inference.options import MAX_TOKENS
from unigen.inference.protocol import EngineInfo, OptionValue
from unigen.inference.request import zip_with_seeds
from unigen.inference.results import RECORD_NOTHING, GenerationResult, Record, Score, Usage
from unigen.media.images import ImageSource, read_image
from unigen.model.template import Output, UnsupportedError, split_system_messages
from unigen.models import to_float32
from unigen.nn.quantized import count_parameters, describe_precision, quantize
from unigen.options import reject_unknown
from unigen.samplers.logits import SamplingOptions
from unigen.samplers.seeds import make_rng
from unigen.tokenizers import text
from unigen.utils.numbers import NonFiniteError
from unigen.utils.option_types import SEED
from unigen.utils.text import first_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

TEXT_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
"""The options of a generation."""
FALLBACK_SAMPLING = {"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.1}
"""How text is sampled where a model's generation_config does not say: greedily it would repeat itself."""


class TransformersEngine(BaseEngine):
    """Answers with text by a language model of transformers with a chat template. Not safe to share between threads."""

    outputs: tuple[Output, ...] = ("text",)

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        accepts_images: bool,
        quantization: str | None = None,
        text_sampling: dict[str, OptionValue] | None = None,
    ) -> None:
        """An engine of a loaded model.

        Args:
            model: a causal language model, or one of images and text, of transformers.
            processor: its tokenizer, or its processor where it reads images, with a chat template.
            accepts_images: whether the model reads images.
            quantization: "8bit" or "4bit" where its weights are quantized.
            text_sampling: how text is sampled in a composed engine where a request does not say
                (`text_sampling_from`).
        """
        self.model, self.processor, self.quantization = model.eval(), processor, quantization
        self.accepts_images, self.text_sampling = accepts_images, text_sampling or {}

    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: Any,
    ) -> list[GenerationResult]:
        """See `InferenceEngine.generate_results`, one after another. options: see `check`."""
        check_record(record, Record(logprobs=True), "it writes text alone")
        for prompt, seed in (pairs := zip_with_seeds(prompts, seeds)):
            self.check(prompt, output, seed=seed, **options)
        return [self._generate_one(Document.of(prompt), seed, record, **options) for prompt, seed in pairs]

    @torch.inference_mode()
    def _generate_one(
        self,
        document: Document,
        seed: int,
        record: Record,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
    ) -> GenerationResult:
        inputs = self._build_inputs(document).to(self.model.device)
        sampling_kwargs: dict[str, object] = {"do_sample": False}
        if temperature > 0:
            sampling_kwargs = {"do_sample": True, "temperature": temperature, "top_p": top_p}
            sampling_kwargs |= {} if top_k is None else {"top_k": top_k}
        sampling_kwargs |= {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
        if record.logprobs:
            sampling_kwargs |= {"output_scores": True, "return_dict_in_generate": True}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(make_rng(seed).initial_seed())
            generated = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                logits_processor=[self._check_finite],
                **sampling_kwargs,
            )
        num_prompt = inputs["input_ids"].shape[1]
        ids_T = (generated.sequences if record.logprobs else generated)[0, num_prompt:]
        answer = str(self.processor.decode(ids_T, skip_special_tokens=True)).strip()
        truncated = len(ids_T) == max_tokens and int(ids_T[-1]) not in self._end_ids()
        settings: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return GenerationResult(
            answer,
            Document([*document.segments, Segment(text=answer, role="assistant")]),
            seed,
            token_ids=ids_T.tolist(),
            logprobs=_token_logprobs(generated.scores, ids_T) if record.logprobs else None,
            usage=Usage(num_prompt, len(ids_T), 0, truncated, 0),
            finish_reason="length" if truncated else "stop",
            settings=settings,
        )

    def _end_ids(self) -> set[int]:
        """The ids that end an answer."""
        end = self.model.generation_config.eos_token_id
        return set() if end is None else {end} if isinstance(end, int) else set(end)

    def check(self, prompt: Prompt, output: Output, *, seed: int = 0, **options: Any) -> None:
        """See `InferenceEngine.check`.

        Args:
            prompt: what would be asked for.
            output: "text".
            seed: of the answer's randomness.
            options: max_tokens; temperature, 0 is greedy; top_p; top_k and repetition_penalty, None is as transformers
                and the model have it.

        Raises:
            ValueError: in one line, for bad values, options that it does not take, and images that it cannot read.
        """
        if output != "text":
            raise ValueError(f"this model cannot answer with {output}: it can with text")
        reject_unknown("this model", options, TEXT_OPTIONS)
        SEED.check("seed", seed)
        SamplingOptions(options.get("temperature", 0.0), 0, options.get("top_p", 1.0))
        MAX_TOKENS.check("max_tokens", options.get("max_tokens", 1))
        self._check_segments(Document.of(prompt))

    def describe(
        self, image: ImageSource, question: str | None = None, *, seed: int = 0, **options: Any
    ) -> str | list[str]:
        """See `InferenceEngine.describe`."""
        prompt: Prompt = [read_image(image), as_text(question or "Describe this picture.")]
        return self.generate(prompt, "text", seed=seed, **options)

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """See `InferenceEngine.default_options`."""
        return dict(self.text_sampling) if output == "text" else {}

    def _check_segments(self, document: Document) -> None:
        """Raises ValueError in one line for segments that the model cannot read."""
        document.check_conditions("this model")
        for segment in document.segments:
            if segment.label is not None:
                raise ValueError("this model reads words, not classes: say it in words")
            if segment.image is not None and not self.accepts_images:
                raise ValueError("this model cannot see pictures: pair with one that can, or leave the picture out")

    def _check_finite(self, ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """A logits processor: the scores as they are. Raises NonFiniteError where any row has no finite maximum."""
        if not bool(scores_BV.amax(-1).isfinite().all()):
            raise NonFiniteError("scores", self.model.dtype)
        return scores_BV

    @torch.no_grad()
    def hidden_states(self, prompt: Prompt) -> torch.Tensor:
        """See `InferenceEngine.hidden_states`.

        Args:
            prompt: what is read.

        Returns:
            States (S, D) after the last norm, of the prompt before an answer would begin.

        Raises:
            ValueError: in one line, for a prompt that the model cannot read.
            NonFiniteError: where states are not finite.
        """
        inputs = self._build_inputs(Document.of(prompt)).to(self.model.device)
        states_SD: torch.Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        if not bool(states_SD.isfinite().all()):
            raise NonFiniteError("states", self.model.dtype)
        return states_SD

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """See `InferenceEngine.score`. Each turn of the assistant is scored after what stands before it, as it would be
        generated; the id that ends the turn is scored, too."""
        return [self._score(Document.of(document), per_token) for document in documents]

    @torch.inference_mode()
    def _score(self, document: Document, per_token: bool) -> Score:
        answers = [segment for segment in document.segments if segment.role == "assistant"]
        if not answers:
            raise ValueError("this document has no text or image of the assistant: there is nothing to score")
        if any(segment.image is not None for segment in answers):
            raise UnsupportedError("this model scores text alone: leave the assistant's pictures out")
        if document.segments[0].role == "assistant":
            raise ValueError("this document begins with the assistant: begin with the user")
        turns = [[*turn] for _, turn in groupby(document.segments, key=lambda segment: segment.role)]
        scores = [
            self._score_last_turn([segment for turn in turns[: index + 1] for segment in turn], len(turn))
            for index, turn in enumerate(turns)
            if turn[0].role == "assistant"
        ]
        token_ids = [id for ids, _ in scores for id in ids]
        logprobs_T = torch.cat([logprobs for _, logprobs in scores])
        return Score(float(logprobs_T.sum()), token_ids, logprobs_T if per_token else None)

    def _score_last_turn(self, segments: list[Segment], num_answers: int) -> tuple[list[int], torch.Tensor]:
        """The ids of the last turn with the one that ends it, and their log-probabilities (T,)."""
        prompt_ids = self._build_inputs(Document(segments[:-num_answers]))["input_ids"][0].tolist()
        inputs = self._build_inputs(Document(segments), add_generation_prompt=False).to(self.model.device)
        ids_L, start = inputs["input_ids"][0], len(prompt_ids)
        ids, end_ids = ids_L.tolist(), self._end_ids()
        if ids[:start] != prompt_ids:
            raise UnsupportedError(
                "this chat template does not continue its prompt with the answer: score with a template that does"
            )
        stop = next((index + 1 for index in range(start, len(ids)) if ids[index] in end_ids), len(ids))
        logits_TV = self.model(**inputs, use_cache=False).logits[0, start - 1 : stop - 1].float()
        if not bool(logits_TV.isfinite().all()):
            raise NonFiniteError("scores", self.model.dtype)
        logprobs_T = logits_TV.log_softmax(-1).gather(-1, ids_L[start:stop, None])[:, 0]
        return ids[start:stop], logprobs_T.cpu()

    def _build_inputs(self, document: Document, add_generation_prompt: bool = True) -> BatchEncoding:
        self._check_segments(document)
        messages: list[dict[str, Any]] = []
        system, segments = split_system_messages(document.segments)
        for segment in [Segment(text=system, role="system"), *segments] if system else segments:
            if not messages or messages[-1]["role"] != segment.role:
                messages.append({"role": segment.role, "content": []})
            if segment.image is not None:
                messages[-1]["content"].append({"type": "image", "image": read_image(segment.image)})  # type: ignore[arg-type]
            else:
                messages[-1]["content"].append({"type": "text", "text": segment.text})
        if not self.accepts_images:
            for message in messages:
                message["content"] = "\n".join(part["text"] for part in message["content"])

        def render(messages: Any) -> str:
            return str(self.processor.apply_chat_template(messages, tokenize=False))

        return self.processor.apply_chat_template(  # type: ignore[return-value]
            text.merge_system_message(messages, render),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        (count, size), model_class = count_parameters(self.model), self.model.config.model_type
        return {
            "family": "transformers",
            "model": f"{model_class}, {count / 1e6:.1f}M parameters",
            "sees": self.accepts_images,
            "system": True,
            "text_sampling": self.text_sampling,
            "precision": describe_precision(self.model, self.quantization),
            "weights_mb": round(size / 1e6, 1),
        }


def _token_logprobs(scores: Sequence[torch.Tensor], ids_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T,) of ids under the distributions of these scores, T of (1, V)."""
    logits_TV = torch.cat(list(scores)).float()
    return logits_TV.log_softmax(-1).gather(-1, ids_T[:, None].to(logits_TV.device))[:, 0].cpu()


def load_transformers(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, quantization: str | None = None
) -> TransformersEngine:
    """Load a language model of transformers, strictly. No code of the folder is run.

    Args:
        folder: of the model and its tokenizer or processor.
        device: where its weights lie.
        dtype: of its weights; None is as stored.
        quantization: "8bit" or "4bit", of the decoder's weights; None is neither.

    Returns:
        An engine.

    Raises:
        ValueError: in one line, for a folder that is damaged or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_MODELS

    accepts_images = str(read_json(folder / CONFIG).get("model_type")) in IMAGE_TEXT_MODELS
    model_class = AutoModelForImageTextToText if accepts_images else AutoModelForCausalLM
    try:
        with silence_transformers():
            processor = load_processor(folder) if accepts_images else text.load(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model folder {folder} cannot be loaded: {first_line(error)}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{folder} has no chat template: give a model that was tuned to chat")
    model = load_pretrained(model_class, folder, dtype)
    if torch.device(device).type == "cpu":
        to_float32(model, model)
    if quantization is not None:
        quantize(model.get_decoder(), quantization, device)
    return TransformersEngine(model.to(device), processor, accepts_images, quantization, text_sampling_from(folder))


def text_sampling_from(folder: Path, fallback: dict[str, Any] | None = None) -> dict[str, Any]:
    """How a model samples text where a request does not say.

    Args:
        folder: of the model. Its generation_config.json counts where that says whether to sample.
        fallback: what counts otherwise, with the file's repetition penalty; None is `FALLBACK_SAMPLING`.

    Returns:
        Values of temperature, top_p, top_k and repetition_penalty, as far as they are set.

    Raises:
        ValueError: in one line, for numbers of the file that are out of their ranges.
    """
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.is_file() else {}
    sampling = {
        name: generation_config[name]
        for name in ("top_p", "top_k", "repetition_penalty")
        if generation_config.get(name) is not None
    }
    if generation_config.get("do_sample") is None:
        defaults = FALLBACK_SAMPLING if fallback is None else fallback
        sampling = defaults | {
            name: value for name, value in sampling.items() if name in defaults and name == "repetition_penalty"
        }
    elif generation_config["do_sample"]:
        sampling = {
            "temperature": 1.0 if generation_config.get("temperature") is None else generation_config["temperature"]
        } | sampling
    else:
        sampling = {"temperature": 0.0} | {
            name: value for name, value in sampling.items() if name == "repetition_penalty"
        }
    try:
        SamplingOptions(**sampling)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return sampling


def load_processor(folder: Path) -> ProcessorMixin:
    """Load the processor of a model of transformers that reads images: its image processor, tokenizer and chat
    template. Its video processor, which needs torchvision, is left out.

    Args:
        folder: of the model.

    Returns:
        A processor of transformers.

    Raises:
        ValueError: where transformers has no processor for it.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    files = (folder / name for name in ("processor_config.json", "preprocessor_config.json", text.TOKENIZER_CONFIG))
    class_names = (read_json(path).get("processor_class") for path in files if path.is_file())
    name = next((name for name in class_names if name), None)
    model_class = getattr(transformers, name, None) if name else None
    model_class = model_class or PROCESSOR_MAPPING.get(
        type(AutoConfig.from_pretrained(folder, local_files_only=True)), None
    )
    if model_class is None:
        raise ValueError(f"transformers has no processor {name or 'of its type of model'}")
    processor = without_video_processor(model_class).from_pretrained(  # type: ignore[arg-type]
        folder, local_files_only=True
    )
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def without_video_processor(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass of a processor whose tokenizer is loaded by `text.load`, and whose video processor is None.

    Args:
        kind: a processor's class.

    Returns:
        The subclass, of the same name.
    """
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING as LOADERS

    def load_parts(cls: type[ProcessorMixin], folder: Path, *_: object, **__: object) -> list[object]:
        parts: list[object] = []
        for name in cls.get_attributes():
            if "tokenizer" in name:
                parts.append(text.load(folder))
            elif "video" in name:
                parts.append(None)
            else:
                parts.append(LOADERS[name].from_pretrained(folder, local_files_only=True))
        return parts

    def check(self: ProcessorMixin, name: str, part: object) -> object:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    methods = {"_get_arguments_from_pretrained": classmethod(load_parts), "check_argument_for_proper_class": check}
    return type(kind.__name__, (kind,), methods)
