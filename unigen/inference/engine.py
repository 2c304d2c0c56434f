"""The engine: all that users ask of one model. Documents in; text and pictures out.

    engine = unigen.load("unigen-tiny")
    image = engine.generate("two apples on a blue background", seed=0)
    for part in engine.stream("a story about a witch and her raven", output="interleaved"): ...

How answers are generated together is `unigen.inference.scheduler`.
Does not depend on: files, HTTP, templates, caches, how any generator works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from unigen.document import Document, Segment, as_text, check_text, is_codes
from unigen.inference.inpainting import prepare_inpainting
from unigen.inference.request import (
    REQUEST_OPTIONS,
    Request,
    build_request,
    check_name,
    default_options,
    reject_unknown_options,
    zip_with_seeds,
)
from unigen.inference.scheduler import Scheduler
from unigen.inference.scoring import CAPTION_PROMPT, rerank_captions, rerank_images
from unigen.inference.sequence import SequenceState
from unigen.limits import LIMITS, check_limit
from unigen.media.display import MediaList, table_html
from unigen.media.images import read_image
from unigen.model.template import Output
from unigen.model.unified import UnifiedModel
from unigen.nn.quantized import count_parameters, describe_precision
from unigen.samplers.seeds import offset_seed
from unigen.utils import progress

GENERATE_OPTIONS = ("n", "candidates", *REQUEST_OPTIONS)
"""The options of methods that ask `generate`."""


class Engine:
    """Generates with one model, which it does not change. Not safe to share between threads.

    Args:
        model: in evaluation mode, as `unigen.load` and `UnifiedModel.inference_copy` give it: with `pack_linears`.
    """

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.text_sampling: dict[str, Any] = {}
        """How a pair has it write text where nothing is asked for, as far as its checkpoint says."""

    # ---------------------------------------------------------------- what users call

    def generate(self, prompt: Any, output: Output = "image", *, n: int = 1, seed: int = 0, **options: Any) -> Any:
        """Answer a prompt: a PIL image, a string, for "interleaved" a list of strings and images, for "pair" (see
        `pair`) a list of one of each. Lists are `unigen.media.display.MediaList`: a notebook shows what is in them.

        prompt: text, an image, a list of both, the number of a class, or a Document (`Document.of` says which strings
        are pictures). n > 1 gives a list of n answers
        with seeds seed, seed+1..
        Options: see `unigen.inference.request.build_request`. Raises ValueError in one line for bad input.
        """
        reject_unknown_options("generate", options, GENERATE_OPTIONS)
        n, seed = check_limit("n", n), check_limit("seed", seed)
        seeds = [offset_seed(seed, i) for i in range(n)]
        answers = self.generate_batch([prompt] * n, seeds, output=output, **options)
        return answers[0] if n == 1 else answers

    def generate_batch(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        candidates: int = 1,
        **options: Any,
    ) -> list[Any]:
        """One answer a prompt, all in one batch; each is what `generate` gives for that prompt and seed alone.

        candidates: so many answers, and the best of them (`unigen.inference.scoring`): captions of a picture each, by
        which the model would likeliest draw it, or pictures of words each, in which it would likeliest read them."""
        reject_unknown_options(
            "generate_batch", options, [name for name in ("seeds", *REQUEST_OPTIONS) if name != "seed"]
        )
        asked = zip_with_seeds(prompts, seeds)
        check_limit("candidates", candidates)
        check_batch_size(len(asked) * candidates)
        if check_limit("previews", options.get("previews", 0)):
            raise ValueError("previews come while a picture is made: ask stream for them")
        if candidates != 1:
            candidate_sets = [self.rivals(p, output, candidates, seed=s, **options) for p, s in asked]
            drawn = iter(
                self._run_requests([request for _, requests in candidate_sets for request in requests], output)
            )
            answers = [[next(drawn) for _ in requests] for _, requests in candidate_sets]
            return self.best([document for document, _ in candidate_sets], output, answers)
        return self._run_requests([self.request(p, output, seed=s, **options) for p, s in asked], output)

    def _run_requests(self, requests: Sequence[Request], output: Output) -> list[Any]:
        """What `generate` gives for each request."""
        parts: list[list[Any]] = [MediaList() for _ in requests]
        is_interleaved = len(requests) == 1 and output == "interleaved"  # how long it will be is not known
        with progress.bar(None if is_interleaved else len(requests), "image", fractions=not is_interleaved) as bar:
            for request_index, part in self.run(
                requests, lambda done: bar.update(0 if is_interleaved else done - bar.n)
            ):
                if isinstance(part, str) and parts[request_index] and isinstance(parts[request_index][-1], str):
                    parts[request_index][-1] += part
                else:
                    parts[request_index].append(part)
                if is_interleaved and not isinstance(part, str):
                    bar.update(1)
        for answer in parts:
            answer[:] = [p.strip() if isinstance(p, str) else p for p in answer]
        if output in ("interleaved", "pair"):
            return MediaList(parts)
        return MediaList(answer[0] if answer else "" for answer in parts)

    def stream(self, prompt: Any, output: Output = "interleaved", **options: Any) -> Iterator[Any]:
        """The parts of one answer as they are made: pieces of text (str) and finished pictures (PIL), in order; before
        a picture as many `Preview`s of it as `previews` asks for, where its generator has any."""
        reject_unknown_options("stream", options, REQUEST_OPTIONS)
        parts = self.run([self.request(prompt, output, **options)])
        return (part for _, part in parts)

    def describe(self, image: Any, question: str | None = None, **options: Any) -> str:
        """A caption of the picture, the best of as many `candidates` as suit the model, or the answer to a question;
        with n > 1 a list of them.

        image: here and in all methods below a path, a PIL image, or all else that `unigen.media.images.read_image`
        takes."""
        reject_unknown_options("describe", options, GENERATE_OPTIONS)
        if question is not None and not check_text("the question", question).strip():
            raise ValueError("the question is empty: ask something, or leave it out for a caption")
        use_candidates = question is None and self.can_rerank
        asked = {"candidates": self.model.template.num_candidates if use_candidates else 1} | options
        answer = self.generate([_as_image(image), as_text(question or CAPTION_PROMPT)], "text", **asked)
        return answer  # type: ignore[no-any-return]

    def edit(self, image: Any, instruction: str, **options: Any) -> Any:
        """The picture changed as the instruction says, of the size that the model draws."""
        reject_unknown_options("edit", options, GENERATE_OPTIONS)
        if not check_text("the instruction", instruction).strip():
            raise ValueError("the instruction is empty: say what to change")
        return self.generate([_as_image(image), as_text(instruction)], "image", **options)

    def pair(self, text: str | None = None, image: Any = None, **options: Any) -> Any:
        """A text and a picture (str, PIL) that belong together, written at once by a generator that writes both; with
        n > 1 a list of such pairs. What is given stays, as the model reads it: a text in lower case and of limited
        length, a picture as its codes. Where nothing is given, both are new. Raises ValueError where the model has no
        such generator."""
        reject_unknown_options("pair", options, GENERATE_OPTIONS)
        if text is not None and not check_text("the text", text).strip():
            raise ValueError("the text is empty: say what the picture shows, or leave it out")
        document = Document([Segment(text=text or "")])
        if image is not None:
            if "fixed" in options:
                raise ValueError("give the picture or its codes, not both")
            pixels = self.model.preprocess_images([read_image(image)])
            defaults = {"temperature": 0.0, "guidance": 1.0} | options  # no code is left to be guided
            options = defaults | {"fixed": self.model.encode_images(pixels)[0].cpu()}
        results = self.generate(document, "pair", **{"generator": "joint"} | options)
        return tuple(results) if options.get("n", 1) == 1 else MediaList(tuple(pair) for pair in results)

    def inpaint(self, image: Any, prompt: str, mask: Any, *, generator: str | None = None, **options: Any) -> Any:
        """The picture, in its own size, with what the mask marks painted anew as the prompt says; all else stays as it
        is. What is painted has no more detail than the pictures that the model draws, and lies inside a square of the
        picture's shorter side around the middle of the marks.

        mask: of the image's shape, white where to paint (`unigen.media.images.read_mask`). Raises ValueError where it
        marks nothing, and for a generator that cannot keep codes.
        """
        reject_unknown_options("inpaint", options, [name for name in GENERATE_OPTIONS if name != "fixed"])
        document = Document.of(as_text(prompt))
        check_name("generator", generator)
        options, composite = prepare_inpainting(self.model, image, mask, generator, options)
        images = self.generate(document, "image", **options)
        return MediaList(map(composite, images)) if isinstance(images, list) else composite(images)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What this model can answer with."""
        return self.model.template.outputs

    def info(self) -> dict[str, Any]:
        """What this model is and can do."""
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
            "takes": {name: list(model.generators.takes(name)) for name in model.generators if name != "text"},
            "sampling": {name: default_options(model, name) for name in model.generators if name != "text"}
            | {name: options for name, options in model.default_sampling.items() if name == "text"},
            "outputs": list(self.outputs),
            "candidates": self.can_rerank,
            "system": self.model.template.supports_system,
            **({"classes": list(model.template.classes)} if model.template.classes else {}),
            "precision": describe_precision(model.backbone.lm, model.quantization),
            "weights_mb": round(count_parameters(model)[1] / 1e6, 1),
            "device": str(model.device),
        }

    def __repr__(self) -> str:
        generators = [name for name in self.model.generators if name != "text"]
        return f"{type(self).__name__}(family={self.model.family!r}, generators={generators})"

    def _repr_html_(self) -> str:
        return table_html(type(self).__name__, self.info())

    def states(self, prompt: Any) -> torch.Tensor:
        """What the model reads of a document before it would answer in text, as states (S, D) after its last norm."""
        return self.running().hidden_states(self.request(prompt, "text"))

    def request(self, prompt: Any, output: Output, **options: Any) -> Request:
        """A checked request (`unigen.inference.request`, which lists the options)."""
        reject_unknown_options("a request", options, REQUEST_OPTIONS)
        return build_request(self.model, prompt, output, **options)

    def check(self, prompt: Any, output: Output, **options: Any) -> None:
        """Raises ValueError in one line for what cannot be asked of the model. options: of a request."""
        self.request(prompt, output, **options)

    @property
    def can_rerank(self) -> bool:
        """Can the model say how well a picture and a text go together, so that one of some candidates is the best?"""
        model = self.model
        return (
            model.vision_encoder is None
            and not model.template.classes
            and {"next-token", "text"} <= set(model.generators)
        )

    def rivals(
        self, prompt: Any, output: Output, candidates: int, *, seed: int = 0, **options: Any
    ) -> tuple[Document, list[Request]]:
        """The document, read, and the requests of its candidates: the one that `candidates` = 1 would ask for and
        others, captions at temperature 1. Raises ValueError where the model cannot compare what they answer."""
        check_limit("candidates", candidates)
        document = self.model.encode_document(Document.of(prompt))
        if not self.can_rerank:
            raise ValueError("candidates are for models that read and draw pictures code by code: leave them out")
        first_request = self.request(document, output, seed=seed, **options)
        num_images = {"text": 1, "image": 0}.get(output)
        if len(document.images()) != num_images or (not num_images and len(document.segments) != 1):
            raise ValueError("candidates are captions of one picture, or pictures of words: ask for one of these")
        candidate_options = options | ({"temperature": 1.0} if num_images else {})
        extra_requests = [self.request(document, output, seed=seed, **candidate_options) for _ in range(1, candidates)]
        for number, request in enumerate(extra_requests, start=1):
            request.candidate_index = number
        return document, [first_request, *extra_requests]

    def best(self, documents: Sequence[Document], output: Output, answers: Sequence[Sequence[Any]]) -> list[Any]:
        """Of the answers of each document's `rivals` the best."""
        if output == "image":
            return rerank_images(self.model, [str(document.segments[0].text) for document in documents], answers)
        return rerank_captions(self.model, documents, [list(dict.fromkeys(captions)) for captions in answers])

    # ---------------------------------------------------------------- requests on their way

    def run(
        self, requests: Sequence[Request], watch: Callable[[float], object] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Answer all requests together; gives (number of the request, piece of text or picture) as they are made.
        watch: is told after each step how many of them are finished (`Scheduler.finished`). Raises ValueError at once
        for what cannot fit the context, and where a model's numbers are not finite when that shows."""
        running = self.running()
        with torch.inference_mode():
            rows = [running.new_sequence(request) for request in requests]
        return self._run_to_completion(running, rows, watch)

    @staticmethod
    def _run_to_completion(
        running: Scheduler, rows: Sequence[SequenceState], watch: Callable[[float], object] | None
    ) -> Iterator[tuple[int, Any]]:
        try:
            with torch.inference_mode():
                for request_index in rows:
                    running.add_sequence(request_index)
            while running:
                yield from running.step()
                for error in running.failed.values():
                    raise error
                if watch is not None:
                    watch(running.num_completed)
        finally:
            running.abort_all()

    def running(self) -> Scheduler:
        """Requests on their way with this model: none yet."""
        return Scheduler(self.model)


def _as_image(image: Any) -> Any:
    """A picture that is no words, whatever its type."""
    return image if is_codes(image) else read_image(image)


def check_batch_size(count: int) -> None:
    """Raises ValueError for more answers than are made at a time."""
    if count > LIMITS["n"].high:
        raise ValueError(f"at most {LIMITS['n'].high:,} answers are made at a time, not {count:,}: ask in several goes")
