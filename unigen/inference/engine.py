"""The engine of one model: documents in; text and images out.

    engine = unigen.load("unigen-tiny")
    image = engine.generate("two apples on a blue background", seed=0)
    for part in engine.stream("a story about a witch and her raven", output="interleaved"): ...

How answers are generated together is `unigen.inference.scheduler`.
Does not depend on: files, HTTP, templates, caches, how any generator works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from PIL.Image import Image

from unigen.document import Document, Prompt, Segment, as_text, is_codes
from unigen.inference.base import BaseEngine
from unigen.inference.candidates import PreparedRequest, can_rerank, expand_candidates, identity, select_best
from unigen.inference.inpainting import limiting_window, prepare_inpainting, random_mask
from unigen.inference.options import CANDIDATES, PREVIEWS, VARIATION, AnswerCount
from unigen.inference.protocol import EngineInfo, OptionValue
from unigen.inference.request import (
    REQUEST_GROUPS,
    REQUEST_OPTIONS,
    Request,
    build_request,
    default_generator,
    default_options,
    zip_with_seeds,
)
from unigen.inference.results import RECORD_NOTHING, Answer, GenerationResult, Record, Score
from unigen.inference.scheduler import Part, Scheduler
from unigen.inference.scoring import CAPTION_PROMPT, score_document
from unigen.inference.sequence import SequenceState
from unigen.media.display import MediaList
from unigen.media.images import ImageSource, read_image
from unigen.model.template import Output
from unigen.model.unified import UnifiedModel
from unigen.nn.quantized import count_parameters, describe_precision
from unigen.options import name_keywords, option_names, reject_unknown
from unigen.utils import progress
from unigen.utils.option_types import COUNT, Name
from unigen.utils.text import check_text

GENERATE_OPTIONS = ("n", "candidates", *REQUEST_OPTIONS)
"""The options of methods that call `generate`."""
BATCH_OPTIONS = ("seeds", "candidates", *(name for name in REQUEST_OPTIONS if name != "seed"))
"""The options of methods that take several prompts."""
METHOD_OPTIONS = {
    "generate": GENERATE_OPTIONS,
    "generate_batch": BATCH_OPTIONS,
    "generate_results": BATCH_OPTIONS,
    "stream": REQUEST_OPTIONS,
    "describe": GENERATE_OPTIONS,
    "edit": GENERATE_OPTIONS,
    "generate_joint": GENERATE_OPTIONS,
    "inpaint": tuple(name for name in GENERATE_OPTIONS if name != "fixed_codes"),
}
"""The options of each method, which takes groups of them as `options` too."""
with_keywords, with_request_keywords = name_keywords([AnswerCount, *REQUEST_GROUPS]), name_keywords(REQUEST_GROUPS)


class Engine(BaseEngine):
    """The local engine: it generates with one model, which it does not change. Not safe to share between threads."""

    batched = True
    accepts_images = True

    def __init__(self, model: UnifiedModel, text_sampling: dict[str, OptionValue] | None = None) -> None:
        """An engine of a model.

        Args:
            model: in evaluation mode, as `unigen.load` and `UnifiedModel.inference_copy` give it: with `pack_linears`.
            text_sampling: the checkpoint's default options of text in a composed engine.
        """
        self.model, self.text_sampling = model, text_sampling or {}

    # ---------------------------------------------------------------- the contract of engines

    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> list[GenerationResult]:
        """See `InferenceEngine.generate_results`: all prompts run in one batch.

        Args:
            prompts: the prompts.
            seeds: one for each prompt; None is 0, 1, ...
            output: kind of the answers.
            record: what to record beside ids and codes.
            **options: see `unigen.inference.request.build_request`. With `candidates`, the result is that of the best
                of so many answers (`unigen.inference.candidates`).

        Returns:
            One result for each prompt, in their order.

        Raises:
            ValueError: in one line, for bad input.
        """
        self._check_option_names("generate_results", options)
        call_options: dict[str, Any] = dict(options)
        candidates = call_options.pop("candidates", 1)
        prompts_and_seeds = zip_with_seeds(prompts, seeds)
        CANDIDATES.check("candidates", candidates)
        check_batch_size(len(prompts_and_seeds) * candidates)
        if PREVIEWS.check("previews", call_options.get("previews", 0)):
            raise ValueError("previews come while a picture is made: ask stream for them")
        prepared = [
            self.prepare(prompt, output, seed=seed, candidates=candidates, record=record, **call_options)
            for prompt, seed in prompts_and_seeds
        ]
        results = iter(self._run_requests([request for group in prepared for request in group.requests], output))
        rows = [[next(results) for _ in group.requests] for group in prepared]
        if candidates == 1:
            return [row[0] for row in rows]
        best = self.select_best(prepared, [[result.output for result in row] for row in rows])
        return [row[index] for row, index in zip(rows, best, strict=True)]

    def _run_requests(self, requests: Sequence[Request], output: Output) -> list[GenerationResult]:
        """The result of each request."""
        parts: list[list[Any]] = [MediaList() for _ in requests]
        is_interleaved = len(requests) == 1 and output == "interleaved"  # its length is unknown
        scheduler, sequences = self._new_sequences(requests)
        with progress.bar(None if is_interleaved else len(requests), "image", fractions=not is_interleaved) as bar:
            for request_index, part in self._run_to_completion(
                scheduler, sequences, lambda done: bar.update(0 if is_interleaved else done - bar.n)
            ):
                if isinstance(part, str) and parts[request_index] and isinstance(parts[request_index][-1], str):
                    parts[request_index][-1] += part
                else:
                    parts[request_index].append(part)
                if is_interleaved and not isinstance(part, str):
                    bar.update(1)
        for answer in parts:
            answer[:] = [p.strip() if isinstance(p, str) else p for p in answer]
        answers = parts if output in ("interleaved", "joint") else [answer[0] if answer else "" for answer in parts]
        return [self._to_result(sequence, answer) for sequence, answer in zip(sequences, answers, strict=True)]

    def _to_result(self, sequence: SequenceState, answer: Answer) -> GenerationResult:
        """The result of a sequence that has ended."""
        record, request = sequence.record, sequence.request
        return GenerationResult(
            answer,
            sequence.document,
            request.seed,
            token_ids=record.token_ids,
            codes=record.codes,
            logprobs=torch.tensor(record.logprobs, dtype=torch.float32) if request.record.logprobs else None,
            latents=record.latents,
            trajectories=record.trajectories,
            usage=record.usage,
            finish_reason="length" if record.usage is not None and record.usage.truncated else "stop",
            settings=request.settings(),
        )

    def _check_option_names(self, method: str, options: Mapping[str, OptionValue]) -> None:
        reject_unknown(method, options, [*METHOD_OPTIONS[method], "options"])

    @with_request_keywords
    def stream(
        self, prompt: Prompt, output: Output = "interleaved", *, seed: int = 0, **options: OptionValue
    ) -> Iterator[Part]:
        """See `InferenceEngine.stream`. Up to `previews` previews come before an image, where its generator has any."""
        self._check_option_names("stream", options)
        parts = self.run_requests([self.build_request(prompt, output, seed=seed, **options)])
        return (part for _, part in parts)

    @with_keywords
    def describe(
        self, image: ImageSource, question: str | None = None, *, seed: int = 0, **options: OptionValue
    ) -> str | list[str]:
        """See `InferenceEngine.describe`. A caption is the best of several candidates, as many as suit the model."""
        self._check_option_names("describe", options)
        if question is not None and not check_text("the question", question).strip():
            raise ValueError("the question is empty: ask something, or leave it out for a caption")
        use_candidates = question is None and self.can_rerank
        num_candidates = self.model.template.num_candidates if use_candidates else 1
        call_options: dict[str, Any] = {"candidates": num_candidates} | options
        prompt: Prompt = [_as_image(image), as_text(question or CAPTION_PROMPT)]
        return self.generate(prompt, "text", seed=seed, **call_options)

    @with_keywords
    def edit(
        self, image: ImageSource, instruction: str, *, seed: int = 0, **options: OptionValue
    ) -> Image | list[Image]:
        """See `InferenceEngine.edit`. The image has the size that the model generates."""
        self._check_option_names("edit", options)
        if not check_text("the instruction", instruction).strip():
            raise ValueError("the instruction is empty: say what to change")
        prompt: Prompt = [_as_image(image), as_text(instruction)]
        call_options: dict[str, Any] = options
        return self.generate(prompt, "image", seed=seed, **call_options)

    @with_keywords
    def generate_joint(
        self, text: str | None = None, image: ImageSource | None = None, **options: OptionValue
    ) -> tuple[str, Image] | list[tuple[str, Image]]:
        """See `InferenceEngine.generate_joint`. One generator generates both at once.

        A given text or image stays as the model reads it: the text in lower case and of limited length, the image as
        its codes. Without either, both are generated.
        """
        self._check_option_names("generate_joint", options)
        if text is not None and not check_text("the text", text).strip():
            raise ValueError("the text is empty: say what the picture shows, or leave it out")
        document = Document([Segment(text=text or "")])
        if image is not None:
            if "fixed_codes" in options:
                raise ValueError("give the picture or its codes, not both")
            pixels = self.model.preprocess_images([read_image(image)])
            defaults = {"temperature": 0.0, "guidance": 1.0} | options  # all codes are fixed: none is sampled
            options = defaults | {"fixed_codes": self.model.encode_images(pixels)[0].cpu()}
        call_options: dict[str, Any] = {"generator": "joint"} | options
        results: Any = self.generate(document, "joint", **call_options)
        return tuple(results) if options.get("n", 1) == 1 else MediaList(tuple(pair) for pair in results)

    @with_keywords
    def inpaint(
        self,
        image: ImageSource,
        prompt: str,
        mask: ImageSource | None = None,
        *,
        variation: float | None = None,
        seed: int = 0,
        **options: OptionValue,
    ) -> Image | list[Image]:
        """See `InferenceEngine.inpaint`. The image keeps its size, and pixels that are not marked stay as they are.

        The generated part has no more detail than images that the model generates. It lies inside a square of the
        image's shorter side around the middle of the marks.

        Args:
            image: a path, a PIL image, or anything else that `unigen.media.images.read_image` takes.
            prompt: what the image shall show.
            mask: of the image's shape, white where to generate (`unigen.media.images.read_mask`).
            variation: instead of a mask, the fraction in (0, 1] of the image, drawn at random, that is regenerated;
                the image is then cropped as the model reads it.
            seed: seed of the image and of the variation.
            **options: options of the generation.

        Returns:
            The image; a list where n > 1.

        Raises:
            ValueError: the mask marks nothing, or the generator cannot keep codes.
        """
        self._check_option_names("inpaint", options)
        document = Document.of(as_text(prompt))
        if (generator := options.get("generator")) is not None:
            Name().check("generator", generator)
        call_options, composite = self._prepare_inpainting(image, mask, variation, options | {"seed": seed})
        images = self.generate(document, "image", **call_options)
        return MediaList(map(composite, images)) if isinstance(images, list) else composite(images)

    def _prepare_inpainting(
        self, image: ImageSource, mask: ImageSource | None, variation: float | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Image], Image]]:
        """The options that keep the codes outside the mask, and a function that puts a generated image into the given
        one."""
        if (mask is None) == (variation is None):
            raise ValueError("give a mask of the region to regenerate, or a variation: a random share of the image")
        if variation is not None:
            variation = VARIATION.check("variation", variation)
            image, mask = random_mask(self.model, image, variation, options.get("seed", 0))
        generator = options.get("generator")
        other_options = {name: value for name, value in options.items() if name != "generator"}
        return prepare_inpainting(self.model, image, mask, generator, other_options)  # type: ignore[arg-type]

    def inpaint_window(self, mask: ImageSource) -> tuple[int, int, int, int] | None:
        """See `InferenceEngine.inpaint_window`: a square."""
        return limiting_window(mask)

    @property
    def local_model(self) -> UnifiedModel:
        """See `InferenceEngine.local_model`."""
        return self.model

    @property
    def outputs(self) -> tuple[Output, ...]:
        """See `InferenceEngine.outputs`."""
        return self.model.template.outputs

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        model = self.model
        count, _ = count_parameters(model.backbone)
        return {
            "family": model.family,
            "backbone": f"{model.backbone.lm.config.model_type}, {count / 1e6:.1f}M parameters",
            "context": model.max_length,
            "image_size": model.image_tokenizer.image_size,
            "sizes": "any" if model.template.variable_size else "this one",
            "tokens_per_image": model.image_tokenizer.grid[0] * model.image_tokenizer.grid[1],
            "vocabulary": {"text": model.vocabulary.text_size, "image": model.vocabulary.image_size},
            "generators": [name for name in model.generators if name != "text"],
            "takes": {n: list(option_names(model.generators.options(n))) for n in model.generators if n != "text"},
            "sampling": {name: default_options(model, name) for name in model.generators if name != "text"}
            | {name: options for name, options in model.default_sampling.items() if name == "text"},
            "outputs": list(self.outputs),
            "candidates": self.can_rerank,
            "system": self.model.template.supports_system,
            **({"classes": list(model.template.classes)} if model.template.classes else {}),
            "precision": describe_precision(model.backbone.lm, model.quantization),
            "weights_mb": round(count_parameters(model)[1] / 1e6, 1),
            "device": str(model.device),
            **({"vllm": model.vllm_support} if model.vllm_support else {}),
        }

    def __repr__(self) -> str:
        generators = [name for name in self.model.generators if name != "text"]
        return f"{type(self).__name__}(family={self.model.family!r}, generators={generators})"

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """See `InferenceEngine.score`."""
        return [score_document(self.model, Document.of(document), per_token) for document in documents]

    def hidden_states(self, prompt: Prompt) -> torch.Tensor:
        """See `InferenceEngine.hidden_states`: those from which a text answer would start."""
        return self.new_scheduler().hidden_states(self.build_request(prompt, "text"))

    def build_request(self, prompt: Prompt, output: Output, **options: OptionValue) -> Request:
        """Build a validated request.

        Args:
            prompt: the prompt.
            output: kind of the answer.
            **options: see `unigen.inference.request.build_request`.

        Returns:
            The request of one sequence.

        Raises:
            ValueError: in one line, for bad input.
        """
        call_options: dict[str, Any] = options
        return build_request(self.model, prompt, output, **call_options)

    def check(self, prompt: Prompt, output: Output, *, seed: int = 0, **options: OptionValue) -> None:
        """See `InferenceEngine.check`."""
        self.build_request(prompt, output, seed=seed, **options)

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """See `InferenceEngine.default_options`: for images, those of the given generator or of the default one."""
        if output == "text":
            return dict(self.text_sampling)
        generator = (given or {}).get("generator") or default_generator(self.model)
        return default_options(self.model, str(generator))

    # ---------------------------------------------------------------- running requests

    def prepare(
        self,
        prompt: Prompt,
        output: Output,
        *,
        seed: int = 0,
        candidates: int = 1,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        variation: float | None = None,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> PreparedRequest:
        """See `BatchedEngine.prepare`."""
        composite: Callable[[Image], Image] = identity
        if image is not None:
            options, composite = self._prepare_inpainting(image, mask, variation, options | {"seed": seed})
            del options["seed"]

        def build(document: Prompt, changes: dict[str, float], index: int) -> Request:
            request = self.build_request(document, output, seed=seed, **options | changes)
            request.record, request.candidate_index = record, index
            return request

        if candidates == 1:
            request = build(prompt, {}, 0)
            return PreparedRequest([request], request.document, request.settings(), composite)
        prepared = expand_candidates(self.model, Document.of(prompt), candidates, build)
        settings = prepared.requests[0].settings()
        return PreparedRequest(prepared.requests, prepared.document, settings, composite)

    @property
    def can_rerank(self) -> bool:
        """Whether the model can choose the best of several candidates."""
        return can_rerank(self.model)

    def select_best(self, prepared: Sequence[PreparedRequest], answers: Sequence[Sequence[Answer]]) -> list[int]:
        """See `BatchedEngine.select_best`."""
        return select_best(self.model, prepared, answers)

    def run_requests(
        self, requests: Sequence[Request], watch: Callable[[float], object] | None = None
    ) -> Iterator[tuple[int, Part]]:
        """Answer all requests in one batch.

        Args:
            requests: validated requests of this model.
            watch: called after each step with the number of finished requests (`Scheduler.num_completed`).

        Returns:
            An iterator of (index of the request, piece of text or image), as they are generated.

        Raises:
            ValueError: at once where a request does not fit the context; while iterating where logits or pixels are
                not finite.
        """
        scheduler, sequences = self._new_sequences(requests)
        return self._run_to_completion(scheduler, sequences, watch)

    def _new_sequences(self, requests: Sequence[Request]) -> tuple[Scheduler, list[SequenceState]]:
        """A scheduler, and the requests' sequences, which are not added yet."""
        scheduler = self.new_scheduler()
        with torch.inference_mode():
            return scheduler, [scheduler.new_sequence(request) for request in requests]

    @staticmethod
    def _run_to_completion(
        scheduler: Scheduler, sequences: Sequence[SequenceState], watch: Callable[[float], object] | None
    ) -> Iterator[tuple[int, Part]]:
        try:
            with torch.inference_mode():
                for sequence in sequences:
                    scheduler.add_sequence(sequence)
            while scheduler:
                yield from scheduler.step()
                for error in scheduler.failed.values():
                    raise error
                if watch is not None:
                    watch(scheduler.num_completed)
        finally:
            scheduler.abort_all()

    def new_scheduler(self) -> Scheduler:
        """A scheduler of this model, without sequences."""
        return Scheduler(self.model)


def _as_image(image: ImageSource) -> Image | torch.Tensor:
    """An image for a prompt: codes as they are, everything else read as pixels."""
    return image if is_codes(image) else read_image(image)


def _list_keywords(name: str, decorate: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    """Give the local engine an inherited method whose signature lists the options."""
    inherited: Callable[..., object] = getattr(BaseEngine, name)

    @wraps(inherited)
    def method(self: Engine, *args: object, **options: OptionValue) -> object:
        return inherited(self, *args, **options)

    setattr(Engine, name, decorate(method))


_list_keywords("generate", with_keywords)
_list_keywords("generate_batch", with_request_keywords)


def check_batch_size(count: int) -> None:
    """Check the number of answers of one call.

    Args:
        count: prompts times candidates.

    Raises:
        ValueError: there are more than one call may generate.
    """
    if count > COUNT.high:
        raise ValueError(f"at most {COUNT.high:,} answers are made at a time, not {count:,}: ask in several goes")
